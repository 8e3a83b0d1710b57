"""``python -m decoder plan``: will speculation pay for this model, on this machine?

Works from an architecture name or a ``config.json``: no weights are read, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from decoder.cli import flag_types as types
from decoder.errors import explained
from decoder.perf_model.model_spec import WEIGHT_BYTES
from decoder.perf_model.parallel.network import NETWORKS
from decoder.perf_model.parallel.ranks import EXCHANGES, MAX_RANKS

from .inputs import DEFAULT_LINK, build_model, parse_range
from .offload import add_read_arguments
from .vllm_table import speculative_config

FORMATS = ("text", "json", "vllm")
_MAX_CONTEXT = 10**8


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "plan",
        help="predict where speculation pays, from a config alone",
        description="Predicted target efficiency, speedup and best draft length per batch size.",
    )
    parser.add_argument(
        "--target", "--model", type=types.path,
        help="architecture name, config.json, model folder, GGUF file or built-in model",
    )  # fmt: skip
    parser.add_argument(
        "--draft", "--assistant-model", type=types.path,
        help="same, or 'eagle', or 'none' (free drafts); default: what the paper pairs, or eagle",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=float, default=0.8,
        help="acceptance rate per draft token (default: %(default)s)",
    )  # fmt: skip
    sizes = "1,8,32, or doubling (default: %(default)s)"
    parser.add_argument("--batch-sizes", default="1..256", help=sizes)
    lengths = "2,4, or a range (default: %(default)s)"
    parser.add_argument("--gammas", "--num-speculative-tokens", default="0..8", help=lengths)
    parser.add_argument(
        "--machine", type=types.path, default="this",
        help="h200, 2xa800, …; 'this' (default: measured now); or a profile JSON of `bench fit`",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=types.whole(1, _MAX_CONTEXT), default=512,
        help="tokens in each cache (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k-experts", type=types.positive, help="experts per token, if not the model's"
    )
    parser.add_argument(
        "--dtype", choices=WEIGHT_BYTES,
        help="of weights; products are in bf16 where they have 8 bits or fewer",
    )  # fmt: skip
    parser.add_argument(
        "--launch-us", type=types.number(1e-3, 1e6),
        help="microseconds per kernel; ~8 for eager PyTorch on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--independent-experts", action="store_true",
        help="the paper's i.i.d. routing (Eq. 8) instead of correlated tokens",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="text",
        help="text; one JSON object; or what vLLM's --speculative-config takes (default: text)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_const", dest="format", const="json",
        help="as --format json, under the name that other commands have for it",
    )  # fmt: skip
    _add_rank_arguments(parser)
    add_read_arguments(parser)
    parser.set_defaults(run=run)


def _add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("expert parallelism (a prediction)")
    group.add_argument(
        "--ranks", type=types.whole(1, MAX_RANKS),
        help="over which each layer's experts are spread; --machine is one of them",
    )  # fmt: skip
    group.add_argument(
        "--exchange", choices=EXCHANGES,
        help="all-reduce (default), or all-gather and sum: attention replicated, as by generate "
        "--parallel expert on GPUs and on CPUs; all-to-all: attention data-parallel",
    )  # fmt: skip
    group.add_argument(
        "--link", choices=NETWORKS, help=f"what joins the ranks (default: {DEFAULT_LINK})"
    )
    group.add_argument(
        "--link-bandwidth", type=types.number(1e-3, 1e6), metavar="GB_PER_S",
        help="per rank and direction, instead of the link's",
    )  # fmt: skip
    group.add_argument(
        "--link-latency", type=types.number(0, 1e6), metavar="US",
        help="microseconds per message, instead of the link's",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        UserError: an unknown name, a file that is not there, or one that cannot be used.
    """
    from decoder.perf_model.planning.planner import make_plan

    with explained("cannot plan"):
        model, profile = build_model(args)
        plan = make_plan(
            model,
            alpha=args.alpha,
            batches=parse_range(args.batch_sizes, doubling=True),
            gammas=parse_range(args.gammas),
            context=args.context,
            profile=profile,
        )
    if args.format == "json":
        print(json.dumps(plan.to_json(), indent=1))
    elif args.format == "vllm":
        print(json.dumps(speculative_config(plan, args.draft)))
    else:
        from .text import print_plan

        print_plan(plan)
    return 0
