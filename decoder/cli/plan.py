"""``python -m decoder plan``: will speculation pay for this model, on this machine?

Works from an architecture name or a ``config.json``: no weights are read, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoder.builtin import BUILTIN
from decoder.errors import explained
from decoder.perf_model.model_spec import EXPERTS_ONLY, WEIGHT_BYTES

from . import flag_types as types

if TYPE_CHECKING:
    from rich.table import Table

    from decoder.perf_model.forward_model import ForwardModel
    from decoder.perf_model.hardware.machine import Machine
    from decoder.perf_model.model_spec import ModelSpec
    from decoder.perf_model.planner import Plan
    from decoder.perf_model.profile import Profile

_MAX_CONTEXT = 10**8
_MAX_VALUES = 4096  # of a range


def parse_range(text: str, doubling: bool = False) -> list[int]:
    """``"1,4,8"`` or ``"0..8"``; with ``doubling`` a range steps 1, 2, 4, … and its end.

    Raises:
        ValueError: not whole numbers, a range that runs backwards, or one of too many values.
    """
    values: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        try:
            low, high = int(first), int(last) if dots else int(first)
        except ValueError:
            raise ValueError(f"expected numbers like 1,2,4 or 1..8, got {text!r}") from None
        if high < low:
            raise ValueError(f"a range must increase, got {part!r}")
        if not doubling and high - low >= _MAX_VALUES:
            raise ValueError(f"a range may have {_MAX_VALUES} values, got {part!r}")
        if not doubling:
            values.extend(range(low, high + 1))
            continue
        while low < high:
            values.append(low)
            low = max(2 * low, 1)
        values.append(high)
    return sorted(set(values))


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "plan",
        help="predict where speculation pays, from a config alone",
        description="Predicted target efficiency, speedup and best draft length per batch size.",
    )
    parser.add_argument(
        "--target",
        "--model",
        type=types.path,
        help="architecture name, config.json, model folder or built-in model",
    )
    parser.add_argument(
        "--draft", "--assistant-model", type=types.path,
        help="same, or 'eagle', or 'none' (free drafts); default: what the paper pairs, or eagle",
    )  # fmt: skip
    parser.add_argument("--alpha", type=float, default=0.8, help="acceptance rate per draft token")
    parser.add_argument("--batch-sizes", default="1..256", help="1,8,32 or 1..256 (doubling)")
    parser.add_argument("--gammas", "--num-speculative-tokens", default="0..8", help="0..8 or 2,4")
    parser.add_argument(
        "--machine", type=types.path, default="this",
        help="h200, 2xa800, …; 'this' (measured now); or a profile JSON of `bench fit`",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=types.whole(1, _MAX_CONTEXT), default=512, help="tokens in each cache"
    )
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        UserError: an unknown name, a file that is not there, or one that cannot be used.
    """
    from decoder.perf_model.planner import make_plan

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
    if args.json:
        print(json.dumps(plan.to_json(), indent=1))
    else:
        _print(plan)
    return 0


def build_model(args: argparse.Namespace) -> tuple[ForwardModel, Profile | None]:
    """The forward model that the arguments describe, and the profile behind it if any."""
    from decoder.perf_model.activation import IidActivation
    from decoder.perf_model.forward_model import ForwardModel

    machine, profile = _machine(args.machine, args.dtype)
    if profile is not None and not args.target:
        model = profile.model
    else:
        if not args.target:
            raise ValueError("--target is needed unless --machine is a profile")
        target = _spec(args.target, args.dtype)
        draft = _draft(args.draft, args.target, target, args.dtype)
        if profile is not None:
            profile.check_target(target)
            model = replace(profile.model, draft=draft if args.draft else profile.model.draft)
        else:
            products = args.dtype if args.dtype in ("fp16", "fp32") else "bf16"
            model = ForwardModel(target, machine, draft, dtype=products)
    if args.top_k_experts:
        if model.target.moe is None:
            raise ValueError(f"--top-k-experts needs a model with experts, got {model.target.name}")
        model = model.with_top_k(args.top_k_experts)
    if args.launch_us:
        model = replace(model, machine=replace(model.machine, launch=args.launch_us * 1e-6))
    if args.independent_experts:
        model = replace(model, activation=IidActivation())
    return model, profile


def _machine(name: str, dtype: str | None) -> tuple[Machine, Profile | None]:
    from decoder.perf_model.hardware.machine import named_machine
    from decoder.perf_model.profile import load_profile

    if name == "this":
        import torch

        from decoder.model.loading import DTYPES
        from decoder.perf_model.hardware.measure_machine import measure_machine

        device = "cuda" if torch.cuda.is_available() else "cpu"
        # fp8 products are not measured: their weights are, in bytes.
        return measure_machine(device, DTYPES.get(dtype or "", torch.bfloat16)), None
    if name.endswith(".json") or Path(name).is_file():
        profile = load_profile(name)
        return profile.model.machine, profile
    return named_machine(name), None


def _spec(name: str, dtype: str | None) -> ModelSpec:
    from decoder.perf_model.config_spec import spec_from_config
    from decoder.perf_model.presets import is_preset, preset_spec

    path = BUILTIN[name].target_path() if name in BUILTIN else Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        folder = name if name in BUILTIN else path.parent.name
        label = folder if path.name == "config.json" else path.stem
        spec = spec_from_config(config, label)
    elif is_preset(name) or not path.suffix:
        spec = preset_spec(name)
    else:
        raise ValueError(f"no such file or architecture: {name!r}")
    return _stored_in(spec, dtype)


def _stored_in(spec: ModelSpec, dtype: str | None) -> ModelSpec:
    """The model with weights of this dtype; as it is without one."""
    if dtype is None:
        return spec
    size = WEIGHT_BYTES[dtype]
    return spec.with_weight_bytes(2.0 if dtype in EXPERTS_ONLY else size, size)


def _draft(
    name: str | None, target_name: str, target: ModelSpec, dtype: str | None
) -> ModelSpec | None:
    from decoder.perf_model.model_spec import eagle_spec
    from decoder.perf_model.presets import is_preset, paper_draft_spec

    if name == "none":
        return None
    if name is None and target_name in BUILTIN:
        name = str(BUILTIN[target_name].draft_of("auto"))
    if name is None and is_preset(target_name):
        return _stored_in(paper_draft_spec(target_name), dtype)
    if name is None or name == "eagle":
        return eagle_spec(target)
    return _spec(name, dtype)


def _print(plan: Plan) -> None:
    from .view import Console

    console = Console()
    console.print(
        f"[bold]{plan.target}[/bold] with {plan.draft} on {plan.machine}: "
        f"acceptance {plan.alpha:g}, context {plan.context}"
    )
    console.print(_summary_table(plan))
    console.print(_grid(plan, "Speedup over plain decoding", "speedup", 2))
    console.print(_grid(plan, "Target efficiency T(B, 1) / T(B, γ + 1)", "target_efficiency", 2))
    console.print(_answer(plan))
    error = "unknown" if plan.error is None else f"± {plan.error:.0%} (90 % of held-out points)"
    console.print(f"[bold]How sure:[/bold] {error}; {plan.basis}.")
    for note in plan.notes:
        console.print(f"Note: {note}.")


def _summary_table(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(title="Best draft length per batch size")
    for name in ("B", "plain step", "experts", "best γ", "speedup", "tokens/s", "break-even α"):
        table.add_column(name, justify="right")
    for entry in plan.batches:
        best = entry.best
        lowest = [c.break_even_alpha for c in entry.cells if c.gamma and c.break_even_alpha]
        band = "" if plan.error is None else f" ± {best.speedup * plan.error:.2f}"
        table.add_row(
            str(entry.batch),
            f"{entry.ar_seconds * 1e3:.2f} ms",
            "dense" if entry.active_share is None else f"{entry.active_share:.0%}",
            str(best.gamma),
            f"{best.speedup:.2f}x{band if best.gamma else ''}",
            f"{best.tokens_per_second:,.0f}",
            f"{min(lowest):.2f}" if lowest else "never",
        )
    return table


def _grid(plan: Plan, title: str, field: str, digits: int) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("B", justify="right")
    gammas = [cell.gamma for cell in plan.batches[0].cells if cell.gamma]
    for gamma in gammas:
        table.add_column(f"γ={gamma}", justify="right")
    for entry in plan.batches:
        values = []
        for cell in entry.cells:
            if not cell.gamma:
                continue
            text = f"{getattr(cell, field):.{digits}f}"
            values.append(f"[bold green]{text}[/]" if cell is entry.best else text)
        table.add_row(str(entry.batch), *values)
    return table


def _answer(plan: Plan) -> str:
    if not plan.pays:
        return "[bold]Speculation does not pay[/bold] at any of these batch sizes."
    ranges = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in plan.pays)
    peak = max(plan.batches, key=lambda entry: entry.best.speedup)
    return (
        f"[bold]Speculation pays[/bold] (2 % or more) at B = {ranges}; most at B = {peak.batch} "
        f"with γ = {peak.best.gamma}: {peak.best.speedup:.2f}x."
    )
