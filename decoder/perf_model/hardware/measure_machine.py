"""Measures this machine's rooflines in about two seconds, without running a model.

The operations timed are the ones that will run: pass the linear and expert functions in use. Times
are best or low-quantile values over weights larger than the last-level cache, so that a busy
neighbour disturbs them little. A GPU is measured in CUDA graphs (``measure_gpu.py``).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .machine import Machine, RowCurve
from .measure_gpu import WIDTH as GPU_WIDTH
from .measure_gpu import Linear, measure_gpu

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_WIDTH = 1024
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def measure_machine(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    linear: Linear | None = None,
    expert_curve: RowCurve | None = None,
    width: int | None = None,
    budget: float = 2.0,
) -> Machine:
    """Measure bandwidth, matrix peak, row curve and call overhead of one device.

    Args:
        linear: ``(x [rows, width], weight [width, width]) -> [rows, width]`` as the model calls it;
            ``torch.nn.functional.linear`` by default.
        expert_curve: seconds per parameter of the expert kernel over rows per expert, from a
            benchmark of that kernel (``bench roofline``).
        width: of the weights; 1024 by default, on a GPU 4096.
        budget: seconds to spend on a CPU; a GPU needs less.
    """
    device = torch.device(device)
    linear = linear or torch.nn.functional.linear
    cache = _cache_bytes(device)
    started = time.perf_counter()
    with torch.inference_mode():
        if device.type == "cuda":
            width = width or GPU_WIDTH
            bandwidth, launch, curve = measure_gpu(device, dtype, linear, width, cache)
        else:
            bandwidth = _read_bandwidth(max(4 * cache, 64e6))
            launch = _call_overhead(dtype)
            curve = _row_curve(dtype, linear, width or _WIDTH, cache, started + budget)
    best = max(
        2.0 * rows / seconds for rows, seconds in zip(curve.rows, curve.seconds, strict=True)
    )
    return Machine(
        name=_device_name(device),
        bandwidth=bandwidth,
        flops={DTYPE_NAMES[dtype]: best},
        launch=launch,
        cache_bytes=cache,
        dense_curve=curve,
        expert_curve=expert_curve,
        source=f"measured here {_manner(device)}, torch {torch.__version__}",
    )


def _best_time(call: Callable[[], object], passes: int) -> float:
    call()
    best = float("inf")
    for _ in range(passes):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def _read_bandwidth(size: float) -> float:
    data = torch.ones(int(size // 4), dtype=torch.float32)
    return data.numel() * 4 / _best_time(data.sum, 4)


def _call_overhead(dtype: torch.dtype) -> float:
    """Seconds per small operator call issued back to back, as a decode step does."""
    x = torch.ones(1, 64, dtype=dtype)
    calls = 200

    def small() -> None:
        for _ in range(calls):
            torch.add(x, x)

    return _best_time(small, 4) / calls


def _row_curve(
    dtype: torch.dtype, linear: Linear, width: int, cache: float, deadline: float
) -> RowCurve:
    """Time per parameter of ``linear`` over rows, cycling through weights beyond the cache.

    Each call is timed by itself and a low quantile taken: a stall hits one call, not the whole row
    count.
    """
    one = width * width * dtype.itemsize
    count = int(min(max(2, 2 * cache // one), 64))
    weights = [torch.randn(width, width, dtype=dtype) for _ in range(count)]
    seconds: dict[int, float] = {}
    for done, size in enumerate(_ROWS):
        x = torch.randn(size, width, dtype=dtype)
        linear(x, weights[0])
        share = (deadline - time.perf_counter()) / (len(_ROWS) - done)
        stop = time.perf_counter() + share
        times: list[float] = []
        while len(times) < 3 or (time.perf_counter() < stop and len(times) < 2 * count):
            weight = weights[len(times) % count]
            started = time.perf_counter()
            linear(x, weight)
            times.append(time.perf_counter() - started)
        seconds[size] = sorted(times)[len(times) // 4] / (width * width)
    return RowCurve(tuple(float(rows) for rows in seconds), tuple(seconds.values()))


def _cache_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [8e6]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 1024, "M": 1024**2}.get(text[-1:], 1)
        sizes.append(float(text.rstrip("KM")) * scale)
    return max(sizes)


def _manner(device: torch.device) -> str:
    if device.type == "cuda":
        return "in CUDA graphs"
    return f"with {torch.get_num_threads()} threads"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
