"""What a plan is made of: the models, the machine and the grid that the arguments name."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from decoder.builtin import BUILTIN
from decoder.checkpoint.folder import is_gguf
from decoder.perf_model.model_spec import EXPERTS_ONLY, WEIGHT_BYTES

from .offload import expert_reads
from .stored import as_in_files, gguf_spec

if TYPE_CHECKING:
    from decoder.perf_model.forward_model import ForwardModel
    from decoder.perf_model.hardware.machine import Machine
    from decoder.perf_model.model_spec import ModelSpec
    from decoder.perf_model.parallel.ranks import Ranks
    from decoder.perf_model.profile import Profile

DEFAULT_LINK = "ib-400"
_HERE = "this"  # machine
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


def build_model(args: argparse.Namespace) -> tuple[ForwardModel, Profile | None]:
    """The forward model that the arguments describe, and the profile behind it if any."""
    from decoder.perf_model.activation import IidActivation
    from decoder.perf_model.forward_model import ForwardModel

    profile = _profile(args.machine)
    if profile is not None:
        model = _of_profile(args, profile)
    elif not args.target:
        raise ValueError("--target is needed unless --machine is a profile")
    else:
        target = _spec(args.target, args.dtype)
        products = "fp16" if args.dtype == "fp16" else target.products
        machine = _machine(args.machine, products)
        model = ForwardModel(target, machine, _draft(args, target), dtype=products)
    if args.top_k_experts:
        if model.target.moe is None:
            raise ValueError(f"--top-k-experts needs a model with experts, got {model.target.name}")
        model = model.with_top_k(args.top_k_experts)
    model = replace(
        model, ranks=_ranks(args, model.target), offload=expert_reads(args, model.target)
    )
    if args.launch_us:
        model = replace(model, machine=replace(model.machine, launch=args.launch_us * 1e-6))
    if args.independent_experts:
        model = replace(model, activation=IidActivation())
    return model, profile


def _of_profile(args: argparse.Namespace, profile: Profile) -> ForwardModel:
    """The model of a fit, with another draft where one is named."""
    if args.dtype is not None:
        raise ValueError(
            f"--dtype does not go with a profile, which is of weights as measured, got {args.dtype}"
        )
    if args.target:
        profile.check_target(_spec(args.target, None))
    if args.draft is None:
        return profile.model
    return replace(profile.model, draft=_draft(args, profile.model.target))


def _ranks(args: argparse.Namespace, target: ModelSpec) -> Ranks | None:
    from decoder.perf_model.parallel.network import NETWORKS
    from decoder.perf_model.parallel.ranks import EXCHANGES, Ranks

    if args.ranks is None:
        for name in ("exchange", "link", "link_bandwidth", "link_latency"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is read with --ranks only")
        return None
    if target.moe is None:
        raise ValueError(f"--ranks needs a model with experts to spread, got {target.name}")
    network = NETWORKS[args.link or DEFAULT_LINK]
    if args.link_bandwidth is not None:
        network = replace(network, name="the given link", bandwidth=args.link_bandwidth * 1e9)
    if args.link_latency is not None:
        network = replace(network, name="the given link", latency=args.link_latency * 1e-6)
    ranks = Ranks(args.ranks, network, args.exchange or EXCHANGES[0])
    ranks.check_experts(target.moe.num_experts)
    return ranks


def _profile(machine: str) -> Profile | None:
    from decoder.perf_model.profile import load_profile

    is_file = machine.endswith(".json") or Path(machine).is_file()
    return load_profile(machine) if machine != _HERE and is_file else None


def _machine(name: str, products: str) -> Machine:
    from decoder.perf_model.hardware.machine import named_machine

    if name == _HERE:
        import torch

        from decoder.model.loading import DTYPES
        from decoder.perf_model.hardware.measure_machine import measure_machine

        device = "cuda" if torch.cuda.is_available() else "cpu"
        # fp8 products are not measured: their weights are, in bytes.
        return measure_machine(device, DTYPES[products])
    return named_machine(name)


def _spec(name: str, dtype: str | None) -> ModelSpec:
    from decoder.perf_model.config_spec import spec_from_config
    from decoder.perf_model.presets import is_preset, preset_spec

    path = BUILTIN[name].target_path() if name in BUILTIN else Path(name)
    if path.is_dir():
        path = path / "config.json"
    if is_gguf(path):
        spec = gguf_spec(path)
    elif path.is_file():
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if dtype is not None and isinstance(config, dict):  # whatever they are stored in
            config.pop("quantization_config", None)
        folder = name if name in BUILTIN else path.parent.name
        label = folder if path.name == "config.json" else path.stem
        spec = spec_from_config(config, label)
        if path.name == "config.json" and config.get("quantization_config"):
            spec = as_in_files(spec, path.parent)
    elif is_preset(name) or not path.suffix:
        spec = preset_spec(name)
    else:
        raise ValueError(f"no such file or architecture: {name!r}")
    return _stored_in(spec, dtype)


def _stored_in(spec: ModelSpec, dtype: str | None) -> ModelSpec:
    """The model with weights of this dtype; as it is without one."""
    if dtype is None:
        return spec
    size, plain = WEIGHT_BYTES[dtype], WEIGHT_BYTES["fp32" if dtype == "fp32" else "bf16"]
    return spec.with_weight_bytes(plain if dtype in EXPERTS_ONLY else size, size, plain=plain)


def _draft(args: argparse.Namespace, target: ModelSpec) -> ModelSpec | None:
    from decoder.perf_model.model_spec import eagle_spec
    from decoder.perf_model.presets import is_preset, paper_draft_spec

    name, dtype = args.draft, args.dtype
    if name == "none":
        return None
    if name is None and args.target in BUILTIN:
        device = None if args.machine == _HERE else "cuda"  # as all are that have a name
        name = str(BUILTIN[args.target].draft_of("auto", device, kernels=dtype is None))
    if name is None and is_preset(args.target):
        return _stored_in(paper_draft_spec(args.target), dtype)
    if name is None or name == "eagle":
        return _stored_in(eagle_spec(target), dtype)
    return _spec(name, dtype)
