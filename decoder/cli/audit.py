"""``python -m decoder audit``: is speculative output the target's own, on this machine?"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from decoder.builtin import builtin_prompts
from decoder.requests.params import SamplingParams
from decoder.requests.reader import Prompt

from .compare import load_prompts
from .flag_types import path, positive, whole
from .options import (
    add_chat_argument,
    add_model_arguments,
    add_sampling_arguments,
    chats,
    sampling_params,
)

if TYPE_CHECKING:
    from rich.table import Table

    from decoder.audit import Audit, LawCheck

_SHOWN = 20
_MAX_SAMPLES = 10_000  # of each prompt: all are held in memory


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "audit",
        aliases=["verify"],
        help="speculative output against the target's own, every difference explained",
        description=(
            "Greedy and coupled output must be identical: each first difference is a numeric "
            "near-tie or unexplained. Sampled output (standard, block) is compared in law. Exit "
            "code 1 if anything is unexplained."
        ),
    )
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts", type=path, metavar="FILE", help="JSONL (default: built-in prompts)"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="use the first N prompts only")
    add_chat_argument(group)
    group.add_argument(
        "--samples", type=whole(1, _MAX_SAMPLES), default=1, metavar="N",
        help="decode every prompt N times with successive seeds",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Audit and print; 1 when something is unexplained."""
    from decoder.audit import audit

    from .setup import Setup
    from .view import Console

    sampling_params(args)  # what is wrong with a flag is said before anything is loaded
    prompts = load_prompts(args.prompts, args.limit) if args.prompts else []
    setup = Setup(args)
    params = sampling_params(args, setup.target)
    if not prompts:
        prompts = [entry.prompt for entry in builtin_prompts(setup.tokenizer)][: args.limit]
    prompts = repeated(list(chats(args, prompts)), params, args.samples)
    plain, speculative = setup.decoder(plain=True), setup.decoder()
    result = audit(plain, speculative, prompts, params, setup.reference)
    if args.json:
        print(json.dumps(result.as_dict()))
    else:
        console = Console()
        console.print(f"{speculative.drafter.name} drafter, {args.verifier}, gamma {args.gamma}")
        console.print(report(result))
        if result.divergences:
            console.print(divergence_table(result))
        console.print("passed" if result.passed else "FAILED")
    return 0 if result.passed else 1


def repeated(prompts: list[Prompt], params: SamplingParams, samples: int) -> list[Prompt]:
    """Every prompt ``samples`` times, with successive seeds from its own or the common one.

    Without a seed each repetition draws one, as every request does.
    """
    out: list[Prompt] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            fields: dict[str, Any] = {"prompt": prompt}
        elif isinstance(prompt, dict):
            fields = prompt
        else:
            fields = {"token_ids": list(prompt)}
        seed = fields.get("seed", params.seed)
        seeds = [None if seed is None else seed + i for i in range(samples)]
        out.extend({**fields, "seed": seed} for seed in seeds)
    return out


def report(result: Audit) -> Table:
    """The counts."""
    from rich.table import Table

    table = Table(show_header=False)
    if result.exact:
        table.add_row("identical sequences", f"{result.identical} of {result.exact}")
        table.add_row("tokens compared", str(result.tokens))
        table.add_row("largest logit jitter between batch shapes", f"{result.jitter:.3g}")
        table.add_row("near-ties", str(len(result.divergences) - result.unexplained))
        table.add_row("unexplained", str(result.unexplained))
    if result.law is not None:
        table.add_row("sampled pairs, compared in law only", str(result.law.sequences))
        table.add_row("log-probability per token, difference", law_line(result.law))
    return table


def law_line(law: LawCheck) -> str:
    """The paired test in one line."""
    return f"{law.difference:+.4f} ± {law.half_width:.4f} (95 %), p = {law.p_value:.3g}"


def divergence_table(result: Audit) -> Table:
    """First differences, unexplained ones first."""
    from rich.table import Table

    table = Table("prompt", "token", "autoregressive", "speculative", "margin", "allowed", "")
    ordered = sorted(result.divergences, key=lambda d: (d.kind == "near-tie", d.index))
    for d in ordered[:_SHOWN]:
        tokens = ("ended" if t is None else str(t) for t in (d.autoregressive, d.speculative))
        table.add_row(
            str(d.index), str(d.offset), *tokens, f"{d.margin:.3g}", f"{d.tolerance:.3g}", d.kind
        )
    if len(ordered) > _SHOWN:
        table.caption = f"{len(ordered) - _SHOWN} more"
    return table
