"""``python -m decoder`` alone: the embedded pair at its real job, then the numbers."""

from __future__ import annotations

import argparse
from typing import Any

from decoder.requests.outputs import Output

from .compare import Comparison, compare
from .flag_types import positive
from .options import add_model_arguments, add_sampling_arguments, sampling_params

_CODE, _PROSE = 8, 4


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "demo",
        help="built-in prompts on the embedded pair (what no sub-command does)",
        description="Complete built-in code and prose prompts as one batch, then compare.",
    )
    parser.add_argument("--repetitions", type=positive, default=3, metavar="N")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.set_defaults(run=run, max_new_tokens=96, batch_size=_CODE + _PROSE)


def run(args: argparse.Namespace) -> int:
    """Print completions and a table; 1 when speculative output differs from the target's own."""
    from decoder.embedded.prompts import CODE_PROMPTS, PROSE_PROMPTS

    from .setup import Setup
    from .view import Console, legend

    params = sampling_params(args)
    console = Console(highlight=False)
    setup = Setup(args)
    plain, speculative = setup.decoder(plain=True), setup.decoder()
    prompts = [*CODE_PROMPTS[:_CODE], *PROSE_PROMPTS[:_PROSE]]
    result = compare(plain, speculative, prompts, params, args.repetitions)
    for output in result.speculative:
        _print_completion(console, output, setup.tokenizer)
    if console.is_terminal:
        console.print(legend())
    console.print(_table(result, speculative.drafter.name, args.gamma))
    same, total = result.identical
    lossless = params.greedy or args.verifier == "coupled"
    return 0 if same == total or not lossless else 1


def _print_completion(console: Any, output: Output, tokenizer: Any) -> None:
    from rich.rule import Rule
    from rich.text import Text

    from .view import colored

    kind = "code" if output.index < _CODE else "prose"
    stats = output.stats
    console.print(
        Rule(
            f"{kind} {output.index + 1}: {stats.acceptance_length:.2f} tokens per round",
            style="dim",
        )
    )
    completion = colored(output, tokenizer) if console.is_terminal else Text(output.text)
    console.print(Text.assemble((output.prompt or "", "dim"), completion))


def _table(result: Comparison, drafter: str, gamma: Any) -> Any:
    from .view import comparison_table, number

    rows = [
        (f"  mean accepted per round, {kind}", "-", number(_mean_accepted(part)))
        for kind, part in (
            ("code", result.speculative[:_CODE]),
            ("prose", result.speculative[_CODE:]),
        )
    ]
    return comparison_table(
        result.plain_stats,
        result.speculative_stats,
        title=f"embedded pair, {_CODE} code + {_PROSE} prose prompts, {drafter}, gamma {gamma}",
        plain_rate=result.plain_rate,
        speculative_rate=result.speculative_rate,
        ratio=result.ratio,
        identical=result.identical,
        extra=rows,
    )


def _mean_accepted(outputs: list[Output]) -> float | None:
    rounds = sum(output.stats.rounds for output in outputs)
    return sum(output.stats.accepted for output in outputs) / rounds if rounds else None
