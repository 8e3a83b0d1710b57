"""Random MoE layers to measure on: weights, routed inputs, and a perfect kernel's time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.workloads.routing import distinct_experts, route
from bench.workloads.shapes import Shape
from bench.workloads.stored import formats_of, stored_weight
from moesd_kernels.experts.spec import ExpertsWeights
from moesd_kernels.formats import GROUPS, dequantize


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer in transformers' layout: ``[E, 2I, H]`` and ``[E, H, I]``.

    Attributes:
        stored: both as they are stored, of which the plain ones are the numbers, or None: plain.
    """

    shape: Shape
    w_gate_up: Tensor
    w_down: Tensor
    stored: ExpertsWeights | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Routed tokens entering a layer: hidden ``[T, H]``, ids and weights ``[T, K]``."""

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    distinct: int


def make_layer(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    weight_format: str = "plain",
    group: int | None = GROUPS[0],
) -> Layer:
    """Random weights scaled so that outputs keep the input's magnitude; never zeros.

    ``weight_format`` is as ``formats_of`` takes it, ``group`` as ``moesd_kernels.quantize`` does.
    """
    E, _, H, I = shape
    generator = torch.Generator(device).manual_seed(seed)
    if weight_format != "plain":
        weights, scales, numbers = [], [], []
        for name, rows, depth in zip(formats_of(weight_format), (2 * I, H), (H, I), strict=True):
            sizes = (E, rows, depth)
            weight, scale = stored_weight(name, *sizes, generator=generator, group=group or depth)
            numbers.append(dequantize(weight, scale, name, dtype))
            weights.append(numbers[-1] if name == "plain" else weight)
            scales.append(scale)
        stored = ExpertsWeights(weights[0], weights[1], None, None, *scales)
        return Layer(shape, numbers[0], numbers[1], stored)

    def plain(rows: int, columns: int) -> Tensor:
        # Filled expert by expert: a normal_ over gigabytes would hold an fp32 copy of them.
        out = torch.empty(E, rows, columns, dtype=dtype, device=device)
        for expert in out:
            expert.normal_(0.0, columns**-0.5, generator=generator)
        return out

    return Layer(shape, plain(2 * I, H), plain(H, I))


def make_batch(
    shape: Shape,
    batch: int,
    rows: int,
    routing: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    union_ratio: float,
) -> Batch:
    """``batch`` sequences of ``rows`` tokens each, routed as ``routing`` says; weights sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = route(routing, batch, rows, shape.E, shape.K, generator, union_ratio)
    hidden = torch.randn(batch * rows, shape.H, generator=generator)
    weights = torch.rand(batch * rows, shape.K, generator=generator).add_(0.1)
    weights /= weights.sum(1, keepdim=True)
    return Batch(
        hidden.to(device, dtype), ids.to(device), weights.to(device, dtype), distinct_experts(ids)
    )


def layer_bytes(
    shape: Shape, tokens: int, distinct: float, itemsize: int, weight_bytes: float | None = None
) -> float:
    """Fewest bytes through memory: each distinct expert once, tokens in and out.

    Args:
        itemsize: bytes of an activation.
        weight_bytes: bytes of a weight, its share of the scales included; ``itemsize`` when None.
    """
    expert = shape.expert_bytes(itemsize if weight_bytes is None else weight_bytes)
    return distinct * expert + 2 * tokens * shape.H * itemsize


def floor_seconds(
    shape: Shape,
    tokens: int,
    distinct: float,
    read: float,
    peak: float,
    itemsize: int,
    weight_bytes: float | None = None,
) -> float:
    """Roofline time max(bytes / read bandwidth, operations / peak) of one layer call."""
    memory = layer_bytes(shape, tokens, distinct, itemsize, weight_bytes) / read
    return max(memory, shape.operations(tokens) / peak)
