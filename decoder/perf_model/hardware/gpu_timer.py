"""Seconds of work on a GPU without the host's share: captured in a CUDA graph, timed by events.

A layer takes the host longer to issue than the device to run, so eager calls would time Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from decoder.model.capture import capture

# About half a millisecond: the host must have launched the graph before the device gets there.
LEAD_CYCLES = 1_000_000

Run = Callable[[], Any]


def captured(run: Run) -> Run:
    """``run`` as a CUDA graph: calling the result replays it. Raises as ``capture`` does."""
    return capture(run)[0].replay


def event_seconds(run: Run) -> tuple[float, Any]:
    """Seconds of the device between two events around ``run``, and what it returned."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    returned = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, returned


def replay_seconds(replay: Run) -> float:
    """Seconds of one replay."""
    # On an idle device the time from the event to the graph's arrival would be counted, too.
    torch.cuda._sleep(LEAD_CYCLES)
    return event_seconds(replay)[0]


def best_seconds(run: Run, repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` replays of ``run``."""
    replay = captured(run)
    return min(replay_seconds(replay) for _ in range(repeats))
