"""Seconds of work on a GPU without the host's share: captured in a CUDA graph, timed by events.

A layer takes the host longer to issue than the device to run, so eager calls would time Python.
Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# About half a millisecond: the host must have launched the graph before the device gets there.
LEAD_CYCLES = 1_000_000

Run = Callable[[], Any]

# Graphs whose capture failed. Torch's allocator goes on asking them which memory is theirs.
_ABANDONED: list[torch.cuda.CUDAGraph] = []


def captured(run: Run) -> Run:
    """``run`` as a CUDA graph; calling the result replays it. The first replay uploads the graph.

    Raises:
        RuntimeError: ``run`` cannot be captured, and why; the current stream and the device are as
            before.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # `torch.cuda.graph` leaves its stream the current one when a capture fails: this block takes it
    # back.
    with torch.cuda.stream(side):
        # Compilation, autotuning and workspace allocation happen outside the capture.
        for _ in range(2):
            run()
        with _refusing_synchronization():  # in a capture that would be harder to recover from
            run()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                run()
        except RuntimeError:
            _ABANDONED.append(graph)
            raise
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


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


@contextmanager
def _refusing_synchronization() -> Iterator[None]:
    """Operations that wait for the device raise a RuntimeError in this block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
