"""Time per kernel launch of one layer call, read from the profiler.

On a GPU the profiler sees each kernel; on a CPU the C++ op marks its phases (plan, gate_up,
down, combine) with profiler scopes. Profiled calls are extra calls: they never enter the timing.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

PHASES = ("plan", "gate_up", "down", "combine")


def launch_seconds(
    call: Callable[[int], object],
    rounds: int,
    before: Callable[[], None],
    device: torch.device,
) -> dict[str, float]:
    """Median seconds of each phase over ``rounds`` profiled calls; phases not seen are absent."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    samples: dict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds):
        before()
        with profile(activities=[activity]) as profiler:
            call(round_)
            if cuda:
                torch.cuda.synchronize(device)
        totals: dict[str, float] = defaultdict(float)
        for event in profiler.events():
            phase = next((p for p in PHASES if p in event.name), None)
            if phase:
                micros = event.device_time_total if cuda else event.cpu_time_total
                totals[phase] += micros / 1e6
        for phase, seconds in totals.items():
            samples[phase].append(seconds)
    return {phase: statistics.median(samples[phase]) for phase in PHASES if samples[phase]}
