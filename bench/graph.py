"""CUDA-graph timing of a stack of layers: what a decode step pays, without host gaps.

Not run on a GPU yet. A graph holds one call on each of several layers with weights of their own, so
that no weight is still in L2 from the call before; routing and inputs are copied into static
buffers before every replay, so that no replay repeats another's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.layer import Batch, Layer

STACK = 8
STACK_BYTES = 60 * 2**30
MIN_STACK = 2

LayerCall = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]


def stack_size(layer_bytes: int) -> int:
    """How many weight sets to rotate over: 8, or as many as fit in 60 GiB, at least 2."""
    return max(MIN_STACK, min(STACK, STACK_BYTES // layer_bytes))


class CapturedStack:
    """One variant captured on every layer of the stack; ``seconds`` times one layer's share."""

    def __init__(self, call: LayerCall, layers: Sequence[Layer], example: Batch) -> None:
        self.inputs = [
            (example.hidden.clone(), example.topk_ids.clone(), example.topk_weights.clone())
            for _ in layers
        ]

        def run() -> None:
            for layer, inputs in zip(layers, self.inputs, strict=True):
                call(layer, *inputs)

        # Compilation, autotuning and workspace allocation happen outside the capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            run()

    def seconds(self, batches: Sequence[Batch]) -> float:
        """Copy ``batches`` (one per layer, cycled) in, replay, and return seconds per layer."""
        for index, (hidden, ids, weights) in enumerate(self.inputs):
            batch = batches[index % len(batches)]
            hidden.copy_(batch.hidden)
            ids.copy_(batch.topk_ids)
            weights.copy_(batch.topk_weights)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(self.inputs)
