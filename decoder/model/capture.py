"""Capturing work as a CUDA graph, so that a failure leaves the process as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# By device, one for all captures: graphs reuse each other's memory only on the same stream, and
# cuBLAS keeps a workspace of tens of megabytes for every stream it has seen.
_STREAMS: dict[int, torch.cuda.Stream] = {}
# Graphs whose capture failed. Torch's allocator goes on asking them which memory is theirs.
_ABANDONED: list[torch.cuda.CUDAGraph] = []


def capture(run: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Warm ``run`` up, and capture it.

    Args:
        pool: of an earlier graph, whose memory is shared.

    Returns:
        The graph, and what ``run`` returned inside it; the first replay uploads the graph.

    Raises:
        RuntimeError: ``run`` cannot be captured, and why; the current stream and the device are as
            before.
    """
    device = torch.cuda.current_device()
    stream = _STREAMS.get(device) or _STREAMS.setdefault(device, torch.cuda.Stream())
    stream.wait_stream(torch.cuda.current_stream())
    # `torch.cuda.graph` leaves its stream the current one when a capture fails: this block takes it
    # back.
    with torch.cuda.stream(stream):
        # Compilation, autotuning and workspace allocation happen outside the capture.
        for _ in range(2):
            run()
        with _refusing_synchronization():  # in a capture that would be harder to recover from
            run()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = run()
        except RuntimeError:
            _ABANDONED.append(graph)
            del _STREAMS[device]  # its allocations would go on being that graph's
            raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


@contextmanager
def _refusing_synchronization() -> Iterator[None]:
    """Operations that wait for the device raise a RuntimeError in this block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
