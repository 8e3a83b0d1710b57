"""Where in a checkpoint a block's tensors lie, and whether what lies there fits.

Published checkpoints have one tensor per expert and projection (``experts.3.gate_proj.weight``;
Mixtral says ``w1``, ``w3``, ``w2``), with ``weight_scale_inv`` beside each where they are FP8;
gpt-oss has experts joined, in MXFP4 as ``*_blocks`` and ``*_scales``; transformers' modules have
them joined. All of it is decided by the headers, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS
from moesd_kernels.formats.description import BLOCK

from .config import MoEConfig
from .shards import Header, Shards

# The block's own folder in Mixtral's checkpoints, and parts that other families name differently.
_RENAMES = (
    (re.compile(r"^block_sparse_moe\."), ""),
    (re.compile(r"^router\."), "gate."),
    (re.compile(r"^(gate\.)?moe_statics\."), "gate."),
    (re.compile(r"^shared_experts\."), "shared_expert."),
)
_EXPERT = re.compile(r"^experts\.(\d+)\.(\w+)\.(.+)$")
_OF_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_PARTS = ("gate.", "experts.", "shared_expert.", "shared_expert_gate.")
# What each joined projection is made of.
_JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_CORRECTION = "gate.e_score_correction_bias"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_FP8 = WEIGHT_FORMATS["fp8_block"]
_INVERSE = "_scale_inv"  # what an FP8 scale's name adds to its weight's


class Found(NamedTuple):
    """A tensor of the block in the files: its whole name there, and what the header says."""

    name: str
    header: Header


class Layout:
    """A block's tensors in a checkpoint.

    Args:
        shards: the checkpoint.
        prefix: of the block's tensors.
        config: the block's shape; weight formats other than plain ones are the files' to say.

    Attributes:
        config: with the formats that the files have.

    Raises:
        ValueError: two tensors have one name, a projection is there in two ways, or ``config`` asks
            for other quantised formats.
        KeyError: there are no experts.
    """

    def __init__(self, shards: Shards, prefix: str, config: MoEConfig) -> None:
        self.shards, self.prefix = shards, prefix
        self.found: dict[str, Found] = {}
        for full in shards:
            if not full.startswith(prefix):
                continue
            name = _canonical(full.removeprefix(prefix))
            if name in self.found:
                raise ValueError(f"{full} is a second {name}")
            self.found[name] = Found(full, shards.header(full))
        self.single = any(_EXPERT.match(name) for name in self.found)
        if not self.single and not any(name.startswith("experts.") for name in self.found):
            raise KeyError(f"checkpoint has no {prefix}experts.*, got {sorted(self.found)[:9]}")
        self._require_one_layout()
        self.config = self._with_formats(config)

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        """Compare what is there with the block's tensors, on the "meta" device.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a shape or dtype does not fit, or a tensor of the block has no place in it.
        """
        used = set()
        for name, target in wanted.items():
            for source, view in self._pieces(name, target):
                self._check_shape(source, tuple(view.shape))
                used.add(source)
                if self._unpacks(name, source):
                    squares = _FP8.scale_shapes(view.shape[-2], view.shape[-1])[0]
                    self._check_shape(f"{source}{_INVERSE}", squares)
                    self._check_dtype(f"{source}{_INVERSE}", _SCALES)
                    used.add(f"{source}{_INVERSE}")
                else:
                    self._check_dtype(source, self._dtypes(name, target))
        left = sorted(name for name in self.found.keys() - used if name.startswith(_PARTS))
        if left:
            raise ValueError(
                f"the config has no place for {self._full(left[0])}, one of {len(left)}"
            )

    def read(
        self, wanted: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The block's tensors, which ``check`` has passed, out of the files.

        Args:
            wanted: name to a tensor of that shape, on the "meta" device.
            dtype: of what is in no quantised format; as stored when None.

        Raises:
            ValueError: no ``dtype``, and several in the files; a router that is computed in fp32
                may have its own.
        """
        if dtype not in (None, *_FLOATS):
            raise ValueError(f"dtype must be one of {', '.join(map(str, _FLOATS))}, got {dtype}")
        common = self._common_dtype(wanted) if dtype is None else dtype
        state = {}
        for name, target in wanted.items():
            kept = self._keeps(name) or name == _CORRECTION
            own = dtype is None and self._stands_alone(name)
            made = target.dtype if kept else self.found[name].header.dtype if own else common
            state[name] = torch.empty(target.shape, dtype=made)
            for source, view in self._pieces(name, state[name]):
                piece = self.shards.read(self._full(source))
                if self._unpacks(name, source):
                    scale = self.shards.read(self._full(f"{source}{_INVERSE}"))
                    piece = _FP8.decode(piece, scale.float())
                view.copy_(piece)
        return state

    def _stands_alone(self, name: str) -> bool:
        return name.startswith("gate.") and self.config.router.precision == "fp32"

    def _common_dtype(self, wanted: Mapping[str, Tensor]) -> torch.dtype:
        named: dict[torch.dtype, str] = {}
        for name, target in wanted.items():
            if self._stands_alone(name) or name == _CORRECTION or self._keeps(name):
                continue
            for source, _ in self._pieces(name, target):
                if not self._unpacks(name, source):
                    named.setdefault(self.found[source].header.dtype, self._full(source))
        if len(named) > 1:
            (first, one), (second, other), *_ = named.items()
            raise ValueError(
                f"{one} is {first} and {other} {second}: expected one dtype, or dtype= for all"
            )
        return next(iter(named), self.found["gate.weight"].header.dtype)

    def _require_one_layout(self) -> None:
        for name in _JOINED:
            ways = [f"experts.{name}", f"experts.{name}_blocks"]
            there = [self._full(way) for way in ways if way in self.found]
            if self.single:
                there.append(f"{self.prefix}experts.*.{_JOINED[name][0]}.weight")
            if len(there) > 1:
                raise ValueError(f"{there[0]} is there twice: also as {there[1]}")

    def _with_formats(self, config: MoEConfig) -> MoEConfig:
        asked = dict(zip(_JOINED, config.spec.formats, strict=True))
        kinds = {name: self._kind(name, asked[name], config) for name in _JOINED}
        for name, kind in kinds.items():
            if asked[name] not in ("plain", kind):
                raise ValueError(
                    f"{self.prefix}experts.{name} is {kind}, and the config says {asked[name]}"
                )
        # Blocks lie along the depth, whatever way round the family has its plain weights.
        transposed = config.spec.transposed and "mxfp4" not in kinds.values()
        first, second = kinds.values()
        spec = replace(config.spec, transposed=transposed, weight_format=first, down_format=second)
        return replace(config, spec=spec)

    def _kind(self, name: str, asked: str, config: MoEConfig) -> str:
        """The weight format that a joined projection will have."""
        if f"experts.{name}_blocks" in self.found:
            return "mxfp4"
        parts = _JOINED[name]
        first = self.found.get(f"experts.0.{parts[0]}.weight" if self.single else f"experts.{name}")
        if first is None or first.header.dtype != _FP8.dtype:
            return "plain" if self.single else asked
        # Squares of gate and up can be joined where none reaches beyond its matrix.
        whole = config.intermediate_size % BLOCK == 0 and not config.spec.interleaved
        return "fp8_block" if not self.single or len(parts) == 1 or whole else "plain"

    def _keeps(self, name: str) -> bool:
        """Whether a tensor of the block lies as a quantised format says: a weight, or its scale."""
        kinds = dict(zip(_JOINED, self.config.spec.formats, strict=True))
        projection = name.removeprefix("experts.").removesuffix("_scale")
        return kinds.get(projection, "plain") != "plain"

    def _unpacks(self, name: str, source: str) -> bool:
        """Whether FP8 weights become numbers: those of linear layers, and what cannot be joined."""
        found = self.found.get(source)
        return found is not None and found.header.dtype == _FP8.dtype and not self._keeps(name)

    def _dtypes(self, name: str, target: Tensor) -> tuple[torch.dtype, ...]:
        """What the pieces of a tensor may be in the files."""
        if not self._keeps(name):
            return _FLOATS
        return _SCALES if target.dtype == torch.float32 else (target.dtype,)

    def _pieces(self, name: str, target: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names of the tensors that make ``target``, and the part of it that is each one's."""
        projection = name.removeprefix("experts.").removesuffix("_scale")
        scale = name.endswith("_scale")
        if projection not in _JOINED:
            found = self.found.get(name)
            row = name == _CORRECTION and found is not None and len(found.header.shape) == 2
            yield name, target[None] if row else target  # Ernie 4.5 has a row of them
        elif f"experts.{projection}_blocks" in self.found:
            suffix, view = ("_scales", target) if scale else ("_blocks", _in_groups(target))
            yield f"experts.{projection}{suffix}", view
        elif not self.single:
            inverse = f"experts.{projection}{_INVERSE}"
            yield inverse if scale and inverse in self.found else name, target
        else:
            parts, leaf = _JOINED[projection], f"weight{_INVERSE if scale else ''}"
            for expert, matrix in enumerate(target):
                rows = matrix.mT if self.config.spec.transposed else matrix
                for place, part in enumerate(parts):
                    view = rows.chunk(len(parts))[place]
                    if self.config.spec.interleaved and len(parts) > 1:
                        view = rows[place::2]
                    yield f"experts.{expert}.{part}.{leaf}", view

    def _check_shape(self, source: str, shape: tuple[int, ...]) -> None:
        if source not in self.found:
            why = ""
            if source.endswith((_INVERSE, "_scale", "_scales")):
                why = ", the scale of weights that are quantised"
            elif self.single and source.startswith("experts."):
                why = f", and {self.config.num_experts} experts are expected"
            raise KeyError(f"checkpoint has no {self._full(source)}{why}")
        if (got := self.found[source].header.shape) != shape:
            raise ValueError(f"{self._full(source)} must be {shape}, got {got}")

    def _check_dtype(self, source: str, allowed: tuple[torch.dtype, ...]) -> None:
        if (got := self.found[source].header.dtype) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"{self._full(source)} must be {expected}, got {got}")

    def _full(self, source: str) -> str:
        """The name in the files, or what it would be."""
        found = self.found.get(source)
        return f"{self.prefix}{source}" if found is None else found.name


def _canonical(name: str) -> str:
    """A tensor's name below the block, with parts under our names."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    if match := _EXPERT.match(name):
        name = f"experts.{int(match[1])}.{_OF_MIXTRAL.get(match[2], match[2])}.{match[3]}"
    return name


def _in_groups(target: Tensor) -> Tensor:
    """Rows of MXFP4 codes as gpt-oss's files have them, [E, R, C / 32, 16]."""
    return target.unflatten(-1, (-1, WEIGHT_FORMATS["mxfp4"].stored))
