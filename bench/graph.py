"""CUDA-graph timing of a stack of layers: what a decode step pays, without host gaps.

Not run on a GPU yet. A graph holds one call on each of several layers with weights of their own, so
that no weight is still in L2 from the call before; routing and inputs are copied into static
buffers before every replay, so that no replay repeats another's experts. The first replay uploads
the graph: it belongs to the warm-up round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.layer import Batch, Layer

STACK = 8
STACK_BYTES = 60 * 2**30
MIN_STACK = 2
# About half a millisecond: the host must have launched the graph before the device gets there.
LEAD_CYCLES = 1_000_000

LayerCall = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]

# Graphs whose capture failed. Torch's allocator goes on asking them which memory is theirs.
_ABANDONED: list[torch.cuda.CUDAGraph] = []


def stack_size(layer_bytes: int) -> int:
    """How many weight sets to rotate over: 8, or as many as fit in 60 GiB, at least 2."""
    return max(MIN_STACK, min(STACK, STACK_BYTES // layer_bytes))


class CapturedStack:
    """One variant captured on every layer of the stack; ``seconds`` times one layer's share.

    Raises:
        RuntimeError: the call cannot be captured, and says why; the current stream and the device
            are as before.
    """

    def __init__(self, call: LayerCall, layers: Sequence[Layer], example: Batch) -> None:
        self.inputs = [
            (example.hidden.clone(), example.topk_ids.clone(), example.topk_weights.clone())
            for _ in layers
        ]

        def run() -> None:
            for layer, inputs in zip(layers, self.inputs, strict=True):
                call(layer, *inputs)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # `torch.cuda.graph` leaves its stream the current one when a capture fails: this block
        # takes it back.
        with torch.cuda.stream(side):
            # Compilation, autotuning and workspace allocation happen outside the capture.
            for _ in range(2):
                run()
            with _refusing_synchronization():  # in a capture that would be harder to recover from
                run()
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=side):
                    run()
            except RuntimeError:
                _ABANDONED.append(self.graph)
                raise
        torch.cuda.current_stream().wait_stream(side)

    def seconds(self, batches: Sequence[Batch]) -> float:
        """Copy ``batches`` (one per layer) in, replay, and return seconds per layer."""
        for (hidden, ids, weights), batch in zip(self.inputs, batches, strict=True):
            hidden.copy_(batch.hidden)
            ids.copy_(batch.topk_ids)
            weights.copy_(batch.topk_weights)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # On an idle device the time from `start` to the graph's arrival would be counted, too.
        torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(self.inputs)


@contextmanager
def _refusing_synchronization() -> Iterator[None]:
    """Operations that wait for the device raise a RuntimeError in this block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
