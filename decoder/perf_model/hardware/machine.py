"""What a machine can do: bandwidth, peak, launch cost; by name or measured here.

Named GPUs carry datasheet numbers times the efficiency reached on the one H200 that was measured
(4.3 of 4.8 TB/s copy, 790 of 989 TFLOP/s bf16). Launch costs of GPUs are an assumption (kernels
inside a CUDA graph), not a measurement. ``bench roofline`` replaces them by measured ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

_COPY_EFFICIENCY = 4.3 / 4.8
_COMPUTE_EFFICIENCY = 790 / 989
_GRAPH_LAUNCH = 2.5e-6
_MAX_DEVICES = 1024  # of a tensor-parallel group, far beyond any


@dataclass(frozen=True, slots=True)
class RowCurve:
    """Measured time of one matrix operation over its number of rows, per weight parameter.

    Args:
        rows: increasing row counts, the first 1.
        seconds: seconds per parameter of the weight at each row count.
    """

    rows: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        ordered = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if len(self.rows) != len(self.seconds) or len(self.rows) < 2 or not ordered:
            raise ValueError(
                f"a curve needs two or more increasing rows and as many seconds, got {self.rows} "
                f"and {self.seconds}"
            )
        if min(self.seconds) <= 0 or self.rows[0] <= 0:
            raise ValueError(f"rows and seconds must be positive, got {self}")

    def at(self, rows: float) -> float:
        """Linear in rows inside the curve; beyond its end proportional to rows."""
        last = self.rows[-1]
        if rows > last:
            return self.seconds[-1] * rows / last
        return float(np.interp(max(rows, self.rows[0]), self.rows, self.seconds))

    def at_memory_speed(self, speed: float) -> RowCurve:
        """The curve while memory is ``speed`` times as fast.

        Its one-row value is what reading the weights takes; only that is rescaled.
        """
        reading = self.seconds[0]
        return RowCurve(
            self.rows, tuple(s + min(s, reading) * (1.0 / speed - 1.0) for s in self.seconds)
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """Achieved (not datasheet) rates of one device, or of a tensor-parallel group as one device.

    Args:
        bandwidth: bytes/s read from memory by a weight-streaming operation.
        flops: dtype name -> FLOP/s of a large matrix product in that dtype.
        launch: seconds per kernel or operator call.
        cache_bytes: last-level cache.
        expert_bandwidth, expert_flops: of the expert kernel where it differs from dense products.
        dense_curve, expert_curve: measured row curves; they take precedence over the two rates.
        sync: seconds added per layer (all-reduces of a tensor-parallel group).
        link_bandwidth: bytes/s to where offloaded or remote experts lie, or None.
        source: where the numbers come from.
    """

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    launch: float
    cache_bytes: float = 0.0
    memory_bytes: float = 0.0
    expert_bandwidth: float | None = None
    expert_flops: float | None = None
    dense_curve: RowCurve | None = None
    expert_curve: RowCurve | None = None
    sync: float = 0.0
    link_bandwidth: float | None = None
    source: str = ""
    devices: int = field(default=1)

    def __post_init__(self) -> None:
        rates = {"bandwidth": self.bandwidth, "launch": self.launch, **self.flops}
        for name in ("expert_bandwidth", "expert_flops", "link_bandwidth"):
            if getattr(self, name) is not None:
                rates[name] = getattr(self, name)
        for name, value in rates.items():
            if not (_is_finite(value) and value > 0):
                raise ValueError(f"{name} of machine {self.name!r} must be positive, got {value!r}")
        for name in ("cache_bytes", "memory_bytes", "sync"):
            value = getattr(self, name)
            if not (_is_finite(value) and value >= 0):
                raise ValueError(f"{name} of machine {self.name!r} must be >= 0, got {value!r}")
        if not self.flops:
            raise ValueError(f"machine {self.name!r} needs flops of at least one dtype, got none")

    def peak(self, dtype: str) -> float:
        """FLOP/s in a dtype; bf16 where that dtype was not measured."""
        if dtype in self.flops:
            return self.flops[dtype]
        return self.flops.get("bf16", max(self.flops.values()))

    def ridge_point(self, dtype: str = "bf16") -> float:
        """Rows at which a 16-bit matrix product turns compute-bound: the paper's RP in tokens."""
        return self.peak(dtype) / self.bandwidth  # two operations and two bytes a weight

    def parallel(self, devices: int, sync: float = 25e-6) -> Machine:
        """``devices`` of this machine in tensor parallel, seen as one.

        Args:
            sync: seconds of the two all-reduces of a layer at small batch (an assumption; NVLink).
        """
        if devices < 1:
            raise ValueError(f"devices must be at least 1, got {devices}")
        if devices > _MAX_DEVICES:
            raise ValueError(f"devices must be at most {_MAX_DEVICES}, got {devices}")
        if devices == 1:
            return self
        return replace(
            self,
            name=f"{devices}x{self.name}",
            bandwidth=self.bandwidth * devices,
            flops={dtype: peak * devices for dtype, peak in self.flops.items()},
            memory_bytes=self.memory_bytes * devices,
            sync=sync,
            devices=devices,
        )

    def at_memory_speed(self, speed: float) -> Machine:
        """This machine while its memory is ``speed`` times as fast: others may share it."""
        return replace(
            self,
            bandwidth=self.bandwidth * speed,
            expert_bandwidth=self.expert_bandwidth and self.expert_bandwidth * speed,
            dense_curve=self.dense_curve and self.dense_curve.at_memory_speed(speed),
            expert_curve=self.expert_curve and self.expert_curve.at_memory_speed(speed),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Machine:
        """The inverse of ``to_json``.

        Raises:
            ValueError: missing or unknown fields.
        """
        fields = dict(data)
        for name in ("dense_curve", "expert_curve"):
            if fields.get(name):
                curve = fields[name]
                fields[name] = RowCurve(tuple(curve["rows"]), tuple(curve["seconds"]))
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a machine description: {error}") from error


def smooth_max(memory: float, compute: float, sharpness: float) -> float:
    """A roofline with a rounded ridge, in seconds; a large sharpness is the plain maximum."""
    high, low = max(memory, compute), min(memory, compute)
    if high <= 0.0:
        return 0.0
    return high * (1.0 + (low / high) ** sharpness) ** (1.0 / sharpness)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _gpu(
    name: str, terabytes: float, tflops: float, cache_mb: float, memory_gb: float, fp8: bool
) -> Machine:
    peak = tflops * 1e12 * _COMPUTE_EFFICIENCY
    flops = {"bf16": peak, "fp16": peak, "fp32": peak / 2}  # fp32 as TF32
    if fp8:
        flops["fp8"] = 2 * peak
    return Machine(
        name=name,
        bandwidth=terabytes * 1e12 * _COPY_EFFICIENCY,
        flops=flops,
        launch=_GRAPH_LAUNCH,
        cache_bytes=cache_mb * 1e6,
        memory_bytes=memory_gb * 1e9,
        source=(
            f"datasheet {terabytes} TB/s and {tflops:g} dense bf16 TFLOP/s, times "
            f"{_COPY_EFFICIENCY:.2f} and {_COMPUTE_EFFICIENCY:.2f} (ratios achieved on an H200); "
            f"{_GRAPH_LAUNCH * 1e6:g} µs per kernel assumed"
        ),
    )


# NVIDIA datasheets, SXM parts where there is a choice; dense (not 2:4 sparse) tensor-core rates.
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _gpu("h200", 4.8, 989, 60, 141, fp8=True),
        _gpu("h100", 3.35, 989, 50, 80, fp8=True),
        _gpu("h800", 3.35, 989, 50, 80, fp8=True),
        _gpu("a100", 2.039, 312, 40, 80, fp8=False),
        _gpu("a800", 2.039, 312, 40, 80, fp8=False),
        _gpu("l40", 0.864, 181, 96, 48, fp8=True),
        _gpu("b200", 8.0, 2250, 126, 180, fp8=True),
    )
}


def named_machine(name: str) -> Machine:
    """A GPU by name; ``2xa800`` is two of them in tensor parallel.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)", name.lower())
    if match is None or match[2] not in MACHINES:
        raise ValueError(f"machine must be one of {sorted(MACHINES)} or e.g. 2xa800, got {name!r}")
    return MACHINES[match[2]].parallel(int(match[1] or 1))
