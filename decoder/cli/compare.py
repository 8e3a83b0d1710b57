"""``python -m decoder compare``: autoregressive against speculative decoding, interleaved."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from decoder.builtin import builtin_prompts
from decoder.cli.files.prompt_lines import checked
from decoder.cli.files.prompts import check_prompts, is_stream, read_prompts
from decoder.drafters.base import forget_finished
from decoder.engine.metrics import DecoderStats
from decoder.errors import UserError
from decoder.gamma.base import FixedGamma
from decoder.gamma.forecast import RunCosts, forecast_ratio
from decoder.requests.outputs import Output
from decoder.requests.params import SamplingParams
from decoder.requests.reader import Request

from .flag_types import path, positive
from .options import (
    add_chat_argument,
    add_model_arguments,
    add_sampling_arguments,
    chats,
    sampling_params,
)


@dataclass(slots=True)
class Comparison:
    """Two ways of decoding the same prompts.

    Attributes:
        plain, speculative: outputs of the last repetition.
        plain_stats, speculative_stats: of the repetition with the median rate.
        plain_rate, speculative_rate: median output tokens per second, prefill included.
        ratio: median over repetitions of the two rates measured side by side.
    """

    plain: list[Output]
    speculative: list[Output]
    plain_stats: DecoderStats
    speculative_stats: DecoderStats
    plain_rate: float
    speculative_rate: float
    ratio: float

    @property
    def identical(self) -> tuple[int, int]:
        """How many sequences agree token for token, of how many."""
        pairs = zip(self.plain, self.speculative, strict=True)
        return sum(a.token_ids == b.token_ids for a, b in pairs), len(self.plain)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        same, total = self.identical
        return {
            "ratio": self.ratio,
            "identical": same,
            "sequences": total,
            "target_efficiency": self.speculative_stats.target_efficiency(self.plain_stats),
            "autoregressive": {"tok_s": self.plain_rate, **self.plain_stats.as_dict()},
            "speculative": {"tok_s": self.speculative_rate, **self.speculative_stats.as_dict()},
        }


def compare(
    plain: Any,
    speculative: Any,
    requests: Sequence[Request],
    repetitions: int,
    budget_s: float = math.inf,
) -> Comparison:
    """Decode ``requests`` with both decoders in turn, ``repetitions`` times.

    Args:
        plain, speculative: warmed up.
        requests: rather than prompts: one without a seed drew it once for all repetitions.
        budget_s: no repetition is begun that would probably end later than this.
    """
    runs: list[list[tuple[float, DecoderStats]]] = [[], []]
    outputs: list[list[Output]] = [[], []]
    start = time.perf_counter()
    for done in range(1, repetitions + 1):
        for side, decoder in enumerate((plain, speculative)):
            forget_finished(decoder.drafter)
            outputs[side] = decoder.generate(requests)
            runs[side].append((decoder.stats.tokens_per_second, decoder.stats))
        if (time.perf_counter() - start) * (done + 1) / done > budget_s:
            break
    ratios = [fast[0] / slow[0] for slow, fast in zip(*runs, strict=True)]
    (plain_rate, plain_stats), (rate, stats) = (_median_run(side) for side in runs)
    return Comparison(
        outputs[0], outputs[1], plain_stats, stats, plain_rate, rate, statistics.median(ratios)
    )


def warmed_up(
    plain: Any, speculative: Any, prompts: Sequence[Any], params: SamplingParams
) -> tuple[list[Request], RunCosts | None]:
    """Run a few tokens with each decoder; the prompts as requests, and what rounds will cost."""
    from decoder.engine.profile_pair import profile_pair

    short = params.updated({"max_new_tokens": min(8, params.max_new_tokens), "min_new_tokens": 0})
    for decoder in (plain, speculative):
        decoder.generate(prompts[: decoder.max_batch_size], short)
    requests = [speculative.reader.read(i, prompt, params) for i, prompt in enumerate(prompts)]
    ids = [request.prompt_ids for request in requests]
    return requests, profile_pair(plain, speculative, ids, params)


def forecast(
    costs: RunCosts | None, decoder: Any, alphas: Sequence[float | None], lengths: Sequence[int]
) -> float | None:
    """The ratio to expect of a decoder, ``None`` where costs or an acceptance are not known.

    Args:
        alphas, lengths: acceptance rate and output tokens of each sequence.
    """
    known = [alpha for alpha in alphas if alpha is not None]
    if costs is None or len(known) < len(alphas):
        return None
    controller = decoder.controller
    fixed = isinstance(controller, FixedGamma)
    gammas = [controller.gamma] if fixed else range(controller.max_gamma + 1)
    return forecast_ratio(costs, known, lengths, gammas, decoder.max_batch_size)


def _median_run(runs: list[tuple[float, DecoderStats]]) -> tuple[float, DecoderStats]:
    ordered = sorted(runs, key=lambda run: run[0])
    return statistics.median(run[0] for run in runs), ordered[len(runs) // 2][1]


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "compare",
        help="autoregressive against speculative decoding",
        description="Run both on the same prompts in turn; medians over repetitions.",
    )
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts", type=path, metavar="FILE", help="JSONL (default: built-in code prompts)"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="use the first N prompts only")
    add_chat_argument(group)
    group.add_argument(
        "--repetitions", type=positive, default=3, metavar="N", help="default: %(default)s"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0 also when outputs differ, which sampling without coupling does."""
    from .setup import Setup
    from .verdict import verdict
    from .view import Console, comparison_table

    sampling_params(args)  # what is wrong with a flag is said before anything is loaded
    prompts = load_prompts(args.prompts, args.limit) if args.prompts else []
    setup = Setup(args)
    params = sampling_params(args, setup.target)
    if not prompts:
        code = (p.prompt for p in builtin_prompts(setup.tokenizer) if p.kind == "code")
        prompts = list(islice(code, args.limit))
    prompts = list(chats(args, prompts))
    plain, speculative = setup.pair()
    requests, costs = warmed_up(plain, speculative, prompts, params)
    result = compare(plain, speculative, requests, args.repetitions)
    alphas = [result.speculative_stats.alpha] * len(requests)
    lengths = [len(output.token_ids) for output in result.plain]
    planned = forecast(costs, speculative, alphas, lengths)
    if args.json:
        print(json.dumps({**result.as_dict(), "ratio_planned_at_alpha": planned}))
        return 0
    title = f"{len(prompts)} prompts, batch {args.batch_size}, {speculative.drafter.name} drafter"
    console = Console()
    console.print(
        comparison_table(
            result.plain_stats,
            result.speculative_stats,
            title=f"{title}, gamma {args.gamma}",
            plain_rate=result.plain_rate,
            speculative_rate=result.speculative_rate,
            ratio=result.ratio,
            identical=result.identical,
            forecasts=[("ratio, planner at this alpha", planned)],
        )
    )
    console.print(verdict(result.plain_stats, result.speculative_stats, result.ratio))
    return 0


def load_prompts(path: str, limit: int | None) -> list[Any]:
    """The prompts of a file.

    Raises:
        UserError: a line that holds none, also after the limit; or there are none.
    """
    if not is_stream(path):
        check_prompts(path)
    prompts = [checked(prompt) for prompt in islice(read_prompts(path), limit)]
    if not prompts:
        raise UserError(f"{path}: expected at least one prompt, got none")
    return prompts
