"""``python -m bench <what>``: one sub-command per module; each module owns its flags."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from decoder.cli.streams import silence_stdout, standard_streams
from decoder.errors import RankLost

COMMANDS = {
    "kernels": "target efficiency of the MoE layer, per launch and for the layer, against peers",
    "roofline": "this machine's ceilings: read bandwidth, peak operations, cost of a call",
    "decode": "T_T(B, 1), T_T(B, gamma), T_D, sigma and speedup of the decoder",
    "generate": "tokens per second against transformers' generate, vLLM and llama.cpp",
    "compare": "a whole data set: outputs that are the target's own, and the ratio",
    "auto": "automatic gamma against autoregressive decoding and fixed gammas",
    "fit": "fit the performance model on measured lines and write a profile",
    "predict": "predicted against measured speedup for lines that were not fitted",
    "paper": "the paper's tables in kind: its value, ours, the model's prediction",
    "plot": "draw pictures from JSON lines",
    "report": "one HTML page for a folder of results",
    "tune": "search kernel configurations on this GPU and write the JSON the selector reads",
    "suite": "a GPU's first minutes: a run-book that may be cut off and goes on",
}


# Packages that ours does not depend on.
OPTIONAL = {"gguf", "matplotlib"}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` and run one sub-command; returns the process exit code."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler narrates every start and stop
    argv = list(sys.argv[1:] if argv is None else argv)
    what = f"python -m bench {argv[0]}" if argv else "python -m bench"
    with standard_streams():
        try:
            args = _parse(argv)
            _set_up(args)
            return int(args.run(args) or 0)
        except BrokenPipeError:
            return 141
        except (ValueError, OSError, NotImplementedError) as error:
            print(f"{what}: {error}", file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in OPTIONAL:
                raise
            print(f"{what}: {error}; pip install {error.name} brings it", file=sys.stderr)
            return 2
        except RankLost as lost:
            print(f"{what}: {lost}; finished lines are kept", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; finished lines are kept", file=sys.stderr)
            return 130
        finally:
            silence_stdout()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="what")
    # Only the module that is asked for is imported: `bench plot` must not need torch to start.
    wanted = [name for name in COMMANDS if name in argv[:1]] or list(COMMANDS)
    for name in wanted:
        sub = subparsers.add_parser(name, help=COMMANDS[name], description=COMMANDS[name])
        if name in argv[:1]:
            module = importlib.import_module(f"bench.commands.{name}")
            module.add_arguments(sub)
            _tell_defaults(sub)
            sub.set_defaults(run=module.run)
    return parser.parse_args(argv)


def _set_up(args: argparse.Namespace) -> None:
    """Threads and device, of the commands that take them."""
    if not hasattr(args, "threads"):
        return
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    # Timers' events and graphs are of the current device: what ran on another would take none.
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)


def _tell_defaults(parser: argparse.ArgumentParser) -> None:
    """Put into each flag's help what it is when it is not given, where its module does not."""
    for action in parser._actions:
        told = action.help or ""
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in told:
            action.help = f"{told} (default: %(default)s)".strip()


if __name__ == "__main__":
    raise SystemExit(main())
