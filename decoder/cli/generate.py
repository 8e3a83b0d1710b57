"""``python -m decoder generate``: complete prompts from the command line or a JSONL file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from decoder.cli.files.prompt_lines import BadLine, LineId, digest
from decoder.cli.files.prompts import (
    STDIN,
    arriving_prompts,
    check_prompts,
    descriptor_of,
    is_stream,
)
from decoder.cli.files.results import ResultWriter, RunStopped
from decoder.engine.metrics import DecoderStats
from decoder.errors import RankLost, UserError, reason
from decoder.requests.outputs import Output, SequenceStats
from decoder.requests.params import SamplingParams
from decoder.requests.reader import NotYet

from . import flag_types as types
from .options import (
    add_chat_argument,
    add_model_arguments,
    add_sampling_arguments,
    chats,
    sampling_params,
)
from .streams import exit_code, say

_QUIET_BELOW = 64  # prompts: shorter runs without a terminal show no progress bar
_QUIET_FOR = 1.0  # seconds; nor do runs that end before
_UNFINISHED = 1  # exit code: some prompts have an error for a result

Prompts = Iterable[dict[str, Any] | BadLine | NotYet]


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "generate",
        help="complete prompts",
        description="Complete prompts, losslessly and faster. Results stream as they finish.",
    )
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt", action="append", type=types.text, metavar="TEXT", help="may be repeated"
    )
    group.add_argument(
        "--prompts", type=types.path, metavar="FILE", help="JSONL (or .gz); - is standard input"
    )
    add_chat_argument(group)
    group.add_argument(
        "--output", "-o", type=types.path, metavar="FILE", help="JSONL of results, flushed per line"
    )
    group.add_argument("--resume", action="store_true", help="skip prompts already in --output")
    group.add_argument("--json", action="store_true", help="print results as JSON lines")
    group.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="mark drafted tokens"
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Decode.

    Returns:
        0 when every prompt is done, 1 when some failed, 128 and its number after a signal: what
        finished before it is kept.

    Raises:
        UserError: something is wrong that can be known before decoding; nothing was changed then.
        RunStopped: decoding cannot go on; what finished is kept.
    """
    if bool(args.prompt) == bool(args.prompts):
        raise UserError("expected prompts from exactly one of --prompt and --prompts")
    if args.output == STDIN:
        raise UserError("--output must name a file, got -; --json prints results")
    sampling_params(args)  # what is wrong with a flag is said before anything is opened
    total = len(args.prompt) if args.prompt else None
    if args.prompts and not is_stream(args.prompts):
        total = check_prompts(args.prompts)
    with ResultWriter(args.output, resume=args.resume, prompts=_source(args)) as writer:
        if total is not None and writer.done:
            known = (item for item in _prompts(args) if not isinstance(item, NotYet))
            total = sum(not writer.is_done(prompt_id(item)) for item in known)
            if total == 0:  # loading a model for it may take minutes
                say(f"nothing left: every prompt has a result in {args.output}")
                return 0
        import torch

        from .setup import Setup

        setup = Setup(args)
        decoder = setup.decoder()
        params = sampling_params(args, setup.target)
        if params.seed is None:
            torch.seed()  # or a resumed run would draw the seeds that its first part has used
        _check_params(decoder, params, templated=args.apply_chat_template)
        writer.begin()
        results = _Results(_shower(args, writer, setup.tokenizer), writer)
        try:
            prompts = _prompts(args, may_wait=decoder.is_idle)
            outputs = decoder.stream(results.pending(prompts), params)
            for output in _with_progress(outputs, total, decoder):
                results.take(output)
        except KeyboardInterrupt as stop:
            say(f"interrupted after {results.count} results")
            return exit_code(stop)
        except (RunStopped, BrokenPipeError):
            raise
        except (Exception, RankLost) as error:
            raise RunStopped(f"stopped after {results.count} results: {reason(error)}") from error
    return results.close(decoder.stats)


class _Results:
    """What comes out of a run, counted: outputs, and errors in place of some."""

    def __init__(self, show: Callable[[Output], None], writer: ResultWriter) -> None:
        self.count = self._failed = 0
        self._first_reason = ""
        self._show = show
        self._writer = writer

    def pending(self, prompts: Prompts) -> Iterator[dict[str, Any] | NotYet]:
        """The prompts that have no result yet; a line that holds none gets an error for one."""
        for item in prompts:
            if isinstance(item, NotYet):
                yield item
                continue
            if self._writer.is_done(prompt_id(item)):
                continue
            if isinstance(item, BadLine):
                self.take(_failed(item))
            else:
                yield item

    def take(self, output: Output) -> None:
        """Show one."""
        self._show(output)
        self.count += 1
        if output.error is not None:
            self._failed += 1
            self._first_reason = self._first_reason or output.error

    def close(self, stats: DecoderStats) -> int:
        """Say what was done, if anything, and how many failed, if any did; the exit code."""
        from .view import stats_line

        if self.count > self._failed or not self._failed:
            say(stats_line(stats))
        if not self._failed:
            return 0
        say(f"moesd: {self._failed} of {self.count} prompts failed; first: {self._first_reason}")
        return _UNFINISHED


def prompt_id(item: dict[str, Any] | BadLine) -> LineId:
    """What identifies a line."""
    found: LineId = item.id if isinstance(item, BadLine) else item["id"]
    return found


def _failed(line: BadLine) -> Output:
    return Output(
        line.id.index, line.id, None, [], "", "error", SequenceStats(0), error=line.reason
    )


def _source(args: argparse.Namespace) -> str | int | None:
    """What prompts come from: a path, or the descriptor of standard input."""
    return args.prompts if args.prompts != STDIN else descriptor_of(sys.stdin)


def _prompts(args: argparse.Namespace, may_wait: Callable[[], bool] = lambda: True) -> Prompts:
    if args.prompts:
        return chats(args, arriving_prompts(args.prompts, may_wait))
    items = [{"prompt": text} for text in args.prompt]
    prompts = ({**item, "id": LineId(i, None, digest(item))} for i, item in enumerate(items))
    return chats(args, prompts)


def _check_params(decoder: Any, params: SamplingParams, templated: bool) -> None:
    """Flags that go with no prompt on this model stop a run before it starts."""
    if templated and getattr(decoder.tokenizer, "chat_template", None) is None:
        raise UserError(
            "--apply-chat-template needs a tokenizer with a chat template, got none; "
            "--chat-template sets one"
        )
    try:
        decoder.reader.read(0, [0], params)
    except UserError as error:
        raise UserError(str(error).removeprefix("prompt 0: ")) from None


def _shower(args: argparse.Namespace, writer: ResultWriter, tokenizer: Any) -> Any:
    """What to do with an output: a line of a file, a line on standard output, or text."""
    if args.output or args.json:
        return writer.write
    from rich.text import Text

    from .view import Console, print_text

    force = {"auto": None, "always": True, "never": False}[args.color]
    console = Console(force_terminal=force, highlight=False, soft_wrap=True)

    def show(output: Output) -> None:
        name = f"[{output.id!r}] " if isinstance(output.id, LineId) else ""
        if output.error is not None:
            console.print(Text(f"{name}error: {output.error}", style="bold red"))
            return
        reason = f"{name}{len(output.token_ids)} tokens, {output.finish_reason}"
        console.print(Text(reason, style="dim"))
        print_text(console, output.prompt or "", output, tokenizer)

    return show


def _with_progress(outputs: Iterator[Output], total: int | None, decoder: Any) -> Iterator[Output]:
    from tqdm import tqdm

    enough = 1 if sys.stderr.isatty() else _QUIET_BELOW
    hidden = total is not None and total <= enough
    with tqdm(
        outputs, total=total, unit="seq", disable=hidden, file=sys.stderr, delay=_QUIET_FOR
    ) as progress:
        for output in progress:
            rate = decoder.stats.tokens_per_second or 0.0
            progress.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
            yield output
