"""The time and the result of a layer under given tiles: what a search of tiles asks for."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.measure.graph import CapturedStack, stack_size
from bench.measure.timer import seconds_of
from bench.workloads.layer import Batch, Layer, make_batch, make_layer
from bench.workloads.routing import DEFAULT_UNION_RATIO
from bench.workloads.shapes import Shape
from moesd_kernels.experts.spec import DEFAULT_SPEC, ExpertsWeights, TopK
from moesd_kernels.experts.triton.types import LayerTiles

DISTINCT_BATCHES = 8
# Results of two tilings differ by the order of fp32 sums and one rounding to the output's dtype.
ROUNDINGS = 4.0


class TilesBench:
    """One shape's weights and inputs, and the time of a configuration on them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, rounds: int, device: torch.device) -> None:
        stack = stack_size(shape.E * shape.expert_bytes(dtype.itemsize))
        self.shape, self.dtype, self.rounds, self.device = shape, dtype, rounds, device
        self.layers = [make_layer(shape, dtype, device, seed) for seed in range(stack)]

    def batches(self, T: int) -> list[Batch]:
        """Inputs of T tokens with different routings."""
        return [
            make_batch(
                self.shape, T, 1, "uniform", self.dtype, self.device, seed, DEFAULT_UNION_RATIO
            )
            for seed in range(DISTINCT_BATCHES)
        ]

    def output(self, batch: Batch, config: LayerTiles) -> Tensor:
        """The first layer's result."""
        call = _caller(config)
        return call(self.layers[0], batch.hidden, batch.topk_ids, batch.topk_weights)

    def seconds(self, batches: list[Batch], config: LayerTiles) -> float:
        """Median seconds of a layer: in graphs, and interpreted simply as long as it takes."""
        if self.device.type == "cpu":
            calls = (partial(self.output, batch, config) for batch in batches[: self.rounds])
            return statistics.median(seconds_of(call, self.device)[0] for call in calls)
        captured = CapturedStack(_caller(config), self.layers, batches[0])
        turns = (
            [batches[(r + i) % len(batches)] for i in range(len(self.layers))]
            for r in range(self.rounds)
        )
        return statistics.median(map(captured.seconds, turns))


def _caller(config: LayerTiles) -> Callable[[Layer, Tensor, Tensor, Tensor], Tensor]:
    from moesd_kernels.experts.triton.launch import fused_experts_triton

    return lambda layer, hidden, ids, weights: fused_experts_triton(
        hidden,
        ExpertsWeights(layer.w_gate_up, layer.w_down),
        TopK(ids, weights),
        DEFAULT_SPEC,
        config=config,
    )


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether every element is within a few roundings of its row's scale."""
    scale = expected.abs().amax(dim=-1, keepdim=True)
    bound = ROUNDINGS * torch.finfo(dtype).eps * scale
    return bool(((got - expected).abs() <= bound).all())
