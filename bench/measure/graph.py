"""CUDA-graph timing of a stack of layers: what a decode step pays, without host gaps.

A graph holds one call on each of several layers with weights of their own, so that no weight is
still in L2 from the call before; routing and inputs are copied into static buffers before every
replay, so that no replay repeats another's experts. The first replay uploads the graph: it belongs
to the warm-up round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from bench.workloads.layer import Batch, Layer
from decoder.perf_model.hardware.gpu_timer import captured, replay_seconds

STACK = 8
STACK_BYTES = 60 * 2**30
MIN_STACK = 2

LayerCall = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]


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

        self._replay = captured(run)

    def seconds(self, batches: Sequence[Batch]) -> float:
        """Copy ``batches`` (one per layer) in, replay, and return seconds per layer."""
        for (hidden, ids, weights), batch in zip(self.inputs, batches, strict=True):
            hidden.copy_(batch.hidden)
            ids.copy_(batch.topk_ids)
            weights.copy_(batch.topk_weights)
        return replay_seconds(self._replay) / len(self.inputs)
