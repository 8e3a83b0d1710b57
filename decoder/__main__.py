"""``python -m decoder``: the demonstration, and sub-commands for real work."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from decoder.cli.options import OneLineParser, parse

from .errors import UserError

_COMMANDS = ("demo", "generate", "compare", "audit", "plan")


def build_parser() -> OneLineParser:
    """The parser of the whole command line."""
    parser = OneLineParser(
        prog="moesd",
        description="Batched, lossless speculative decoding. Without a command: the demo.",
    )
    subparsers = parser.add_subparsers(
        dest="command", metavar="command", parser_class=OneLineParser
    )
    for name in _COMMANDS:
        importlib.import_module(f".cli.{name}", __package__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; mistakes of the user are one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "demo")
    args = parse(build_parser(), arguments)
    try:
        return args.run(args)
    except UserError as error:
        print(f"moesd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
