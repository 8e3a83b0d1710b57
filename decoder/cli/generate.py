"""``python -m decoder generate``: complete prompts from the command line or a JSONL file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from decoder.errors import UserError
from decoder.requests.outputs import Output

from .files import LineId, ResultWriter, check_prompts, read_prompts
from .options import add_model_arguments, add_sampling_arguments, sampling_params

_QUIET_BELOW = 64  # prompts: shorter runs without a terminal show no progress bar


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "generate",
        help="complete prompts",
        description="Complete prompts, losslessly and faster. Results stream as they finish.",
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    group.add_argument("--prompts", metavar="FILE", help="JSONL (or .gz); - is standard input")
    group.add_argument("--output", "-o", metavar="FILE", help="JSONL of results, flushed per line")
    group.add_argument("--resume", action="store_true", help="skip prompts already in --output")
    group.add_argument("--json", action="store_true", help="print results as JSON lines")
    group.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="mark drafted tokens"
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Decode; 0 when every prompt is done, 130 when interrupted (finished results are kept)."""
    if bool(args.prompt) == bool(args.prompts):
        raise UserError("expected prompts from exactly one of --prompt and --prompts")
    params = sampling_params(args)
    total = len(args.prompt) if args.prompt else None
    if args.prompts and args.prompts != "-":
        total = check_prompts(args.prompts)
    from .setup import Setup

    setup = Setup(args)
    decoder = setup.decoder()
    prompts: Iterable[dict[str, Any]]
    if args.prompt:
        prompts = ({"id": LineId(i, None), "prompt": text} for i, text in enumerate(args.prompt))
    else:
        prompts = read_prompts(args.prompts)
    with ResultWriter(args.output, resume=args.resume) as writer:
        show = _shower(args, writer, setup.tokenizer)
        if total is not None:
            total -= len(writer.done)
        outputs = decoder.stream(writer.pending(prompts), params)
        try:
            for output in _with_progress(outputs, total, decoder):
                if output.error is not None:
                    raise UserError(output.error)
                show(output)
        except KeyboardInterrupt:
            print(f"interrupted after {decoder.stats.sequences} results", file=sys.stderr)
            return 130
    from .view import stats_line

    print(stats_line(decoder.stats), file=sys.stderr)
    return 0


def _shower(args: argparse.Namespace, writer: ResultWriter, tokenizer: Any) -> Any:
    """What to do with an output: a line of a file, a line on standard output, or text."""
    if args.output or args.json:
        return writer.write
    from rich.console import Console
    from rich.text import Text

    from .view import colored

    force = {"auto": None, "always": True, "never": False}[args.color]
    console = Console(force_terminal=force, highlight=False, soft_wrap=True)

    def show(output: Output) -> None:
        name = f"[{output.id!r}] " if isinstance(output.id, LineId) else ""
        reason = f"{name}{len(output.token_ids)} tokens, {output.finish_reason}"
        console.print(Text(reason, style="dim"))
        completion = colored(output, tokenizer) if console.is_terminal else Text(output.text)
        console.print(Text.assemble((output.prompt or "", "dim"), completion))

    return show


def _with_progress(outputs: Iterator[Output], total: int | None, decoder: Any) -> Iterator[Output]:
    from tqdm import tqdm

    enough = 1 if sys.stderr.isatty() else _QUIET_BELOW
    hidden = total is not None and total <= enough
    with tqdm(outputs, total=total, unit="seq", disable=hidden, file=sys.stderr) as progress:
        for output in progress:
            rate = decoder.stats.tokens_per_second or 0.0
            progress.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
            yield output
