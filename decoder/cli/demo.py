"""``python -m decoder`` alone: a built-in model answers, then the numbers and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from typing import Any

from decoder.builtin import BuiltinPrompt, builtin_prompts, stated_alpha
from decoder.requests.outputs import Output
from decoder.requests.params import SamplingParams
from decoder.sampling import VERIFIERS

from .compare import Comparison, compare, forecast, warmed_up
from .flag_types import positive
from .options import add_model_arguments, add_sampling_arguments, sampling_params

_COUNTS = {"code": 8, "chat": 4, "prose": 4}  # prompts of each kind; a model has two of them
_BUDGET_S = 35.0  # for repetitions: with all before them, a minute


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "demo",
        help="built-in prompts on a built-in model (what no sub-command does)",
        description="Decode built-in prompts as one batch, plainly and speculatively, and compare.",
    )
    parser.add_argument(
        "--repetitions", type=positive, default=3, metavar="N",
        help=f"as many of them as fit into about {_BUDGET_S:.0f} s (default: 3)",
    )  # fmt: skip
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    # Four drafts are drafted also where that is no gain: the demonstration shows what it brings.
    parser.set_defaults(run=run, max_new_tokens=96, batch_size=12)


def run(args: argparse.Namespace) -> int:
    """Print answers, a table and a verdict; 1 when speculative output is not the target's own."""
    from .setup import Setup
    from .verdict import verdict
    from .view import Console, legend

    sampling_params(args)  # what is wrong with a flag is said before anything is loaded
    console = Console(highlight=False)
    setup = Setup(args)
    params = sampling_params(args, setup.target)
    plain, speculative = setup.pair()
    asked = _chosen(builtin_prompts(setup.tokenizer))
    requests, costs = warmed_up(plain, speculative, [entry.prompt for entry in asked], params)
    drafter = speculative.drafter.name
    stated = [_stated(args, params, setup.name, drafter, entry.kind) for entry in asked]
    predicted = forecast(costs, speculative, stated, [r.max_new_tokens for r in requests])
    if predicted is not None:
        console.print(f"predicted: {predicted:.2f} times the speed of plain decoding", style="dim")
    result = compare(plain, speculative, requests, args.repetitions, _BUDGET_S)
    for entry, output in zip(asked, result.speculative, strict=True):
        _print_answer(console, entry, output, setup.tokenizer)
    if console.is_terminal:
        console.print(legend())
    alphas = [result.speculative_stats.alpha] * len(asked)
    lengths = [len(output.token_ids) for output in result.plain]
    forecasts = [
        ("ratio, predicted before the run", predicted),
        ("ratio, planner at this alpha", forecast(costs, speculative, alphas, lengths)),
    ]
    title = f"{setup.name}, {drafter} drafter, gamma {args.gamma}"
    console.print(_table(result, asked, title, forecasts))
    console.print(verdict(result.plain_stats, result.speculative_stats, result.ratio, predicted))
    same, total = result.identical
    lossless = params.greedy or args.verifier == "coupled"
    return 0 if same == total or not lossless else 1


def _stated(
    args: argparse.Namespace, params: SamplingParams, target: str, drafter: str, kind: str
) -> float | None:
    """The acceptance rate to expect; cards have that of their own drafts, verified as usual."""
    if args.draft is not None or (not params.greedy and args.verifier != VERIFIERS[0]):
        return None
    name = "eagle" if drafter.startswith("eagle") else drafter
    return stated_alpha(target, name, kind, params.temperature)


def _chosen(prompts: Sequence[BuiltinPrompt]) -> list[BuiltinPrompt]:
    return [
        entry
        for kind, count in _COUNTS.items()
        for entry in islice((entry for entry in prompts if entry.kind == kind), count)
    ]


def _print_answer(console: Any, entry: BuiltinPrompt, output: Output, tokenizer: Any) -> None:
    from rich.rule import Rule

    from .view import print_text

    title = f"{entry.kind} {output.index + 1}: {output.stats.acceptance_length:.2f} tokens a round"
    console.print(Rule(title, style="dim"))
    # An answer begins below its question; a text is completed where it ends.
    between = "" if entry.text == entry.prompt else "\n"
    print_text(console, entry.text + between, output, tokenizer)


def _table(
    result: Comparison,
    asked: Sequence[BuiltinPrompt],
    title: str,
    forecasts: Sequence[tuple[str, float | None]],
) -> Any:
    from .view import comparison_table, number

    kinds = list(dict.fromkeys(entry.kind for entry in asked))
    counts = ", ".join(f"{sum(e.kind == kind for e in asked)} {kind}" for kind in kinds)
    outputs = {
        kind: [o for e, o in zip(asked, result.speculative, strict=True) if e.kind == kind]
        for kind in kinds
    }
    return comparison_table(
        result.plain_stats,
        result.speculative_stats,
        title=f"{title}, {counts} prompts",
        plain_rate=result.plain_rate,
        speculative_rate=result.speculative_rate,
        ratio=result.ratio,
        identical=result.identical,
        forecasts=forecasts,
        extra=[
            (f"  mean accepted per round, {kind}", "-", number(_mean_accepted(outputs[kind])))
            for kind in kinds
        ],
    )


def _mean_accepted(outputs: Sequence[Output]) -> float | None:
    rounds = sum(output.stats.rounds for output in outputs)
    return sum(output.stats.accepted for output in outputs) / rounds if rounds else None
