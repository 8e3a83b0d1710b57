"""``LayerStack`` for a GPU: the same layers from Triton kernels and cuBLAS, in few launches each.

It has the arguments of the C++ class (``csrc/cpu/ops/layers.cpp``), knows shared experts as well,
and joins what a GPU would pay launches for: gate and up projections with their activation, the norm
before a router with it, and a MoE block's combine with the additions and the norm that follow it.
Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesd_kernels.dense.triton.activation_kernel import act_and_mul
from moesd_kernels.dense.triton.attention import ragged_attention
from moesd_kernels.dense.triton.linear_kernel import gate_up, linear
from moesd_kernels.dense.triton.norm_kernel import MAX_BLOCK, add_rms_norm
from moesd_kernels.dense.triton.norm_route_kernel import add_norm_route
from moesd_kernels.dense.triton.rope_kernel import rope_to_cache
from moesd_kernels.dense.triton.router_kernel import topk_of_logits
from moesd_kernels.experts.spec import ExpertsSpec, ExpertsWeights, TopK
from moesd_kernels.experts.triton.combine_norm import After
from moesd_kernels.experts.triton.launch import fused_experts_add_norm, fused_experts_triton
from moesd_kernels.experts.triton.layer import MAX_PAIRS

# Rows up to which a product's time is that of its weights' bytes; beyond, cuBLAS multiplies faster.
FEW_ROWS = 128


def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, batch_invariant: bool = False
) -> Tensor:
    """x ``[T, K]`` times w ``[N, K]`` transposed, plus bias."""
    return linear(x, w, bias) if _in_order(x, batch_invariant) else F.linear(x, w, bias)


def _in_order(x: Tensor, batch_invariant: bool) -> bool:
    """Whether the kernels multiply x ``[T, K]``, whose sums have one order in any batch."""
    return batch_invariant or x.shape[0] <= FEW_ROWS


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP: gate_up ``[2I, H]``, down ``[H, I]`` and its bias."""

    gate_up: Tensor
    down: Tensor
    down_bias: Tensor | None
    activation: str
    batch_invariant: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """``down(act(gate(x)) * up(x))`` of x ``[T, H]``."""
        if _in_order(x, self.batch_invariant):
            inner = gate_up(x, self.gate_up, self.activation)
        else:
            gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
            inner = act_and_mul(gate, up, self.activation)
        return product(inner, self.down, self.down_bias, self.batch_invariant)


@dataclass(frozen=True, slots=True)
class Moe:
    """A softmax router ``[E, H]``, its experts, and a shared expert with its gate ``[1, H]``."""

    router: Tensor
    top_k: int
    renormalize: bool
    cast: bool
    weights: ExpertsWeights
    spec: ExpertsSpec
    batch_invariant: bool = False
    shared: Mlp | None = None
    shared_gate: Tensor | None = None

    def routed(
        self, x: Tensor, delta: Tensor, norm: Tensor, eps: float, most: int | None
    ) -> tuple[Tensor, Tensor, TopK]:
        """``x + delta`` and its norm, ``[T, H]``, and the experts of that, at most ``most``.

        Those that are left share the whole weight of ``top_k``.
        """
        kept = min(most or self.top_k, self.top_k)
        # Without renormalization the whole is a token's own, and known from all of its experts.
        chosen = kept if self.renormalize else self.top_k
        rule = chosen, self.renormalize, x.dtype if self.cast else torch.float32
        if _in_order(x, self.batch_invariant) and x.shape[1] <= MAX_BLOCK:
            x, states, weights, ids = add_norm_route(x, delta, norm, eps, self.router, *rule)
        else:
            x, states = add_rms_norm(x, delta, norm, eps)
            logits = product(states, self.router, None, self.batch_invariant)
            weights, ids = topk_of_logits(logits, *rule)
        if kept < chosen:
            heaviest = weights[:, :kept]  # they come in descending order
            weights = heaviest * (weights.sum(-1, keepdim=True) / heaviest.sum(-1, keepdim=True))
            ids = ids[:, :kept].contiguous()
        return x, states, TopK(ids, weights)

    def then_norm(
        self, x: Tensor, states: Tensor, routing: TopK, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The block of states ``[T, H]`` added to the stream x, and the norm of the sum."""
        most = MAX_PAIRS // routing.ids.shape[1]  # tokens of the launch that does all of it
        if self.batch_invariant and len(x) > most:
            parts = zip(*(t.split(most) for t in (x, states, *routing)), strict=True)
            done = [self.then_norm(a, b, TopK(*own), norm, eps) for a, b, *own in parts]
            sums, norms = zip(*done, strict=True)
            return torch.cat(sums), torch.cat(norms)
        shared = None if self.shared is None else self.shared(states)
        layer = states, self.weights, routing, self.spec
        if len(x) <= most:
            gate = None if self.shared_gate is None else self.shared_gate[0]
            after = After(x, norm, eps, shared, gate)
            return fused_experts_add_norm(*layer, after, batch_invariant=self.batch_invariant)
        out = fused_experts_triton(*layer)
        if shared is not None and self.shared_gate is not None:
            out = out + torch.sigmoid(F.linear(states, self.shared_gate)) * shared
        return add_rms_norm(x, out, norm, eps)


@dataclass(slots=True)
class _Layer:
    qkv: Tensor  # [(Hq + 2 Hkv) * D, H]
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    following_norm: Tensor
    epsilons: Sequence[float]  # of the norms: q, k, post, following
    scale: float
    window: int
    q_heads: int
    kv_heads: int
    batch_invariant: bool
    mlp: Mlp | Moe | None = None


class DeviceStack:
    """The decoder layers of a Llama-shaped model on a GPU.

    Args:
        batch_invariant: have every product's sums in one order, whatever the number of rows: a
            forward of Q positions is then Q forwards of one, bit for bit. Costs where rows are
            many, as in prompts.
    """

    def __init__(self, batch_invariant: bool = False) -> None:
        self.batch_invariant = batch_invariant
        self._layers: list[_Layer] = []

    def add_layer(
        self,
        qkv: Tensor,
        qkv_bias: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        out: Tensor,
        out_bias: Tensor | None,
        post_norm: Tensor,
        following_norm: Tensor,
        epsilons: Sequence[float],
        scale: float,
        window: int,
        q_heads: int,
        kv_heads: int,
    ) -> None:
        """Append a layer: its attention, the norm after it and the norm that follows the layer."""
        projections = qkv, qkv_bias, q_norm, k_norm, out, out_bias
        shape = scale, window, q_heads, kv_heads, self.batch_invariant
        self._layers.append(_Layer(*projections, post_norm, following_norm, epsilons, *shape))

    def set_block(self, block: Mlp | Moe | None) -> None:
        """The MLP of the layer added last; a layer without one is left to the caller."""
        self._layers[-1].mlp = block

    def run(
        self,
        x: Tensor,
        states: Tensor,
        cos: Tensor,
        sin: Tensor,
        index: Tensor,
        positions: Tensor,
        rows: Tensor | None,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        first: int,
        stop: int,
        mlps: bool,
        columns: Tensor | None,
        length: int | None = None,
        most_experts: int | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """Layers from ``first`` up to ``stop``, as the C++ class runs them.

        Args:
            length: no position is as large; the whole row where it is not known.
            most_experts: of a token, which share the weight of all that its router chooses.
        """
        for i in range(first, stop):
            layer = self._layers[i]
            wanted = None
            if columns is not None and i + 1 == len(self._layers):
                start = torch.arange(0, positions.numel(), positions.shape[1], device=x.device)
                wanted = columns + start[:, None]  # [B, n] into the flattened tokens
            attended = _attend(
                layer, states, cos, sin, index, positions, rows, keys[i], values[i], wanted, length
            )
            if wanted is not None:
                x = x[wanted.flatten()]
            projected = product(attended, layer.out, layer.out_bias, layer.batch_invariant)
            if mlps:
                x, states = _block(layer, x, projected, most_experts)
            else:
                x, states = _add(layer, x, projected)
            if not mlps or layer.mlp is None:
                return x, states, i
        return x, states, stop


def _add(layer: _Layer, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, delta, layer.post_norm, layer.epsilons[2])


def _block(
    layer: _Layer, x: Tensor, projected: Tensor, most_experts: int | None
) -> tuple[Tensor, Tensor]:
    """Add the attention's output; then the layer's MLP and the norms around it, if it has one."""
    following = layer.following_norm, layer.epsilons[3]
    if isinstance(layer.mlp, Moe):
        norm = layer.post_norm, layer.epsilons[2]
        x, states, routing = layer.mlp.routed(x, projected, *norm, most_experts)
        return layer.mlp.then_norm(x, states, routing, *following)
    x, states = _add(layer, x, projected)
    return (x, states) if layer.mlp is None else add_rms_norm(x, layer.mlp(states), *following)


def _attend(
    layer: _Layer,
    states: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    keys: Tensor,
    values: Tensor,
    wanted: Tensor | None,
    length: int | None,
) -> Tensor:
    """The attention of a layer's states ``[T, H]``: heads ``[T, Hq * D]``, of ``wanted`` alone."""
    qkv = product(states, layer.qkv, layer.qkv_bias, layer.batch_invariant)
    q_eps, k_eps = layer.epsilons[:2]
    flat_keys, flat_values = (slab.flatten(0, 1).flatten(1) for slab in (keys, values))
    queries = rope_to_cache(
        qkv, cos, sin, layer.q_norm, q_eps, layer.k_norm, k_eps, index,
        layer.q_heads, layer.kv_heads, flat_keys, flat_values,
    )  # fmt: skip
    if wanted is not None:
        queries = queries[wanted.flatten()]
        positions = positions.flatten()[wanted]
    queries = queries.view(*positions.shape, *queries.shape[1:])
    attended = ragged_attention(
        queries, keys, values, positions, layer.scale, layer.window, None, rows, length=length
    )
    return attended.flatten(0, 1).flatten(1)
