"""``python -m decoder``: the demonstration, and sub-commands for real work.

The one place that turns failures into lines: whatever ends a command is one line on standard error
and an exit code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from decoder.cli.files.results import RunStopped
from decoder.cli.streams import exit_code, say, silence_stdout, standard_streams, unwinding_signals

from .errors import RankLost, RequestFailed, UserError, one_line, reason

if TYPE_CHECKING:
    from decoder.cli.options import OneLineParser

_COMMANDS = ("demo", "generate", "compare", "audit", "plan")
# Exit codes. Signals give 128 and their number; 1 is also what commands return that found a fault.
_STOPPED, _MISTAKE, _FAULT, _SIGPIPE = 1, 2, 70, 141


def build_parser() -> OneLineParser:
    """The parser of the whole command line."""
    from decoder.cli.options import OneLineParser

    parser = OneLineParser(
        prog="moesd",
        description="Batched, lossless speculative decoding. Without a command: the demo.",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of what fails; before the command"
    )
    subparsers = parser.add_subparsers(
        dest="command", metavar="command", parser_class=OneLineParser
    )
    for name in _COMMANDS:
        importlib.import_module(f".cli.{name}", __package__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 when a run ended early, requests failed or a check did not hold; 2 for a mistake of the
        user; 70 for a fault of ours; 128 and its number for a signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    with standard_streams(), unwinding_signals():
        try:
            return _run(arguments, int(debug))
        except KeyboardInterrupt as stop:
            say("interrupted")
            return exit_code(stop)
        except BrokenPipeError:
            return _SIGPIPE
        except (Exception, RankLost) as error:
            if debug:
                raise
            return _told(error)
        finally:
            silence_stdout()


def _run(arguments: list[str], start: int) -> int:
    """Run the command that begins at ``start``, or the demo where none does."""
    from decoder.cli.arguments import parse
    from decoder.cli.parallel_options import is_silent, silence

    stderr = silence() if is_silent(arguments) else None
    first = arguments[start : start + 1]
    if not first or (first[0].startswith("-") and first[0] not in ("-h", "--help")):
        arguments.insert(start, "demo")
    args = parse(build_parser(), arguments)
    if sys.stdout is None and not getattr(args, "output", None):
        raise UserError("cannot write to standard output: it is closed")
    if stderr is not None:
        from decoder.cli.setup import work

        return work(args, stderr)
    code: int = args.run(args)
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def _told(error: BaseException) -> int:
    """Say what failed, in one line; the exit code."""
    what, code, hint = reason(error), _FAULT, ""
    if isinstance(error, UserError):
        code = _MISTAKE
    elif isinstance(error, (RunStopped, RankLost, RequestFailed, OSError)):
        code = _STOPPED
    else:
        kind = type(error).__name__
        what = what if what.startswith(kind) else f"{kind}: {what}"
        hint = " (python -m decoder --debug ... shows the traceback)"
    say(f"moesd: error: {one_line(what)}{hint}")
    return code


if __name__ == "__main__":
    sys.exit(main())
