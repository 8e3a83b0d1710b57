"""What a terminal shows: which tokens were drafted, and tables of results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import Any

import rich.console
from rich.table import Table
from rich.text import Text

from decoder.engine.metrics import DecoderStats
from decoder.requests.outputs import Output

DRAFTED = "green"
TARGET = "bold magenta"


class Console(rich.console.Console):
    """A console that leaves it to the command what to do when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise  # called where the error is being handled


def colored(output: Output, tokenizer: Any) -> Text:
    """The output's text: drafted and accepted tokens green, the target's own magenta."""
    text = Text()
    shown = end = 0
    for drafted, run in groupby(output.drafted):
        end += sum(1 for _ in run)
        # Prefixes are decoded, not single tokens: a character may span several tokens.
        # One that ends inside a character has something else in that character's place.
        prefix = tokenizer.decode(output.token_ids[:end], skip_special_tokens=True)
        alike = zip(prefix, output.text, strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], alike))
        text.append(output.text[shown:known], style=DRAFTED if drafted else TARGET)
        shown = max(shown, known)
    return text.append(output.text[shown:])


def print_text(console: Console, prompt: str, output: Output, tokenizer: Any) -> None:
    """A prompt and what followed it: coloured on a terminal, elsewhere the text as it is."""
    if console.is_terminal:
        console.print(Text.assemble((prompt, "dim"), colored(output, tokenizer)))
    else:  # rich would make spaces of tabs, and leave out what terminals obey
        console.file.write(f"{prompt}{output.text}\n")
        console.file.flush()


def legend() -> Text:
    """Explains the colours."""
    return Text.assemble(("drafted and accepted", DRAFTED), "  ", ("the target's own", TARGET))


def number(value: float | None, digits: int = 2, suffix: str = "") -> str:
    """A number for a table cell; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}{suffix}"


def comparison_table(
    plain: DecoderStats,
    speculative: DecoderStats,
    *,
    title: str,
    plain_rate: float,
    speculative_rate: float,
    ratio: float,
    identical: tuple[int, int],
    forecasts: Sequence[tuple[str, float | None]] = (),
    extra: Sequence[tuple[str, str, str]] = (),
) -> Table:
    """Autoregressive against speculative decoding, one quantity per line.

    Args:
        forecasts: of the ratio, by name.
        extra: further lines, below alpha.
    """
    table = Table(title=title)
    table.add_column("")
    table.add_column("autoregressive", justify="right")
    table.add_column("speculative", justify="right")
    table.add_row("tokens/s", number(plain_rate, 1), number(speculative_rate, 1))
    table.add_row("ratio", "1.00x", number(ratio, 2, "x"))
    for name, value in forecasts:
        table.add_row(name, "", number(value, 2, "x"))
    table.add_row("alpha (acceptance rate)", "-", number(speculative.alpha, 3))
    for row in extra:
        table.add_row(*row)
    table.add_row("sigma (emitted / positions verified)", "-", number(speculative.sigma, 3))
    table.add_row("tokens per row and round", "1.00", number(speculative.acceptance_length, 2))
    efficiency = speculative.target_efficiency(plain)
    table.add_row("target efficiency", "-", number(efficiency, 3))
    plain_ms, speculative_ms = plain.ms_per_round(), speculative.ms_per_round()
    for phase, ms in plain_ms.items():
        table.add_row(f"ms per round: {phase}", number(ms, 2), number(speculative_ms[phase], 2))
    table.add_row("rounds", f"{plain.rounds}", f"{speculative.rounds}")
    same, total = identical
    table.add_row("identical outputs", "", f"{'yes' if same == total else 'NO'} ({same}/{total})")
    return table


def stats_line(stats: DecoderStats) -> str:
    """One line of numbers for the end of a run."""
    parts = [
        f"{stats.sequences} sequences",
        f"{stats.tokens} tokens",
        f"{number(stats.tokens_per_second, 1)} tok/s",
    ]
    if stats.alpha is not None:
        parts += [
            f"alpha {number(stats.alpha, 3)}",
            f"sigma {number(stats.sigma, 3)}",
            f"{number(stats.acceptance_length)} tokens/round",
        ]
    phases = ", ".join(f"{phase} {ms:.2f}" for phase, ms in stats.ms_per_round().items())
    read = "" if stats.offload is None else f"; {stats.offload.line()}"
    return ", ".join(parts) + f"; ms per round: {phases}{read}"
