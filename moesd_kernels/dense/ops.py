"""The C++ CPU operators `torch.ops.moesd.*` as typed Python functions.

Every function computes a row from that row alone, bit for bit: whatever else is in the batch, in
which order, and on how many threads. `unavailable()` says why they cannot be called, if so. Shapes
and dtypes are checked in C++ (`csrc/cpu`); gradients are not supported.

`B` sequences, `T` tokens, `E` experts, `K` experts per token, `H` hidden, `I` intermediate.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moesd_kernels import library


@functools.cache
def unavailable() -> str | None:
    """None when the operators are loaded (building them if needed), otherwise the reason."""
    reason = library.load()
    if reason is None:
        _register_fakes()
    return reason


def isa() -> str:
    """The instruction set in use: amx, avx512_bf16, avx512, avx2 or portable.

    Raises:
        RuntimeError: the operators are unavailable, or MOESD_CPU_ISA names an unknown or
            unsupported set.
    """
    _require()
    return torch.ops.moesd.cpu_isa()


def experts(
    hidden: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    activation_limit: float | None = None,
    activation_alpha: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum over k of weight[t, k] * down(act(gate(x)) * up(x)) of expert ids[t, k].

    Args:
        hidden: [T, H] bf16, fp16 or fp32.
        w_gate_up: [E, 2I, H] contiguous, gate rows first (g0, u0, g1, ... when `interleaved`;
            [E, I, H] when not `gated`; the last two dimensions swapped when `transposed`).
        w_down: [E, H, I] contiguous ([E, I, H] when `transposed`).
        topk_ids: [T, K] int32 or int64; ids outside [0, E) contribute nothing.
        topk_weights: [T, K] floating point.
        gate_up_bias: [E, 2I] in the order of the rows of `w_gate_up`.
        down_bias: [E, H].
        activation: silu, gelu, gelu_tanh, relu or relu2.
        gated: whether there is an up projection to multiply with.
        interleaved: gate and up rows alternate.
        transposed: weights are stored [in, out]; a slower path.
        activation_limit: clamps the gate from above and the up projection on both sides.
        activation_alpha: gpt-oss' gate, `(up + 1) * gate * sigmoid(alpha * gate)`.
        out: [T, H] contiguous, overwritten; allocated when None.

    Returns:
        `out`, in hidden's dtype. Intermediates and the sum over k (in ascending order of expert id)
        are fp32; amx and avx512_bf16 round the activation to bf16.
    """
    _require()
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format) if out is None else out
    torch.ops.moesd.experts(
        *(hidden, w_gate_up, w_down, topk_ids, topk_weights, gate_up_bias, down_bias),
        *(activation, gated, interleaved, transposed, activation_limit, activation_alpha, out),
    )
    return out


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times w [N, K] transposed, plus bias [N]: fp32 sums, the result in x.dtype."""
    _require()
    return torch.ops.moesd.linear(x, w, bias)


def ragged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    *,
    window: int = 0,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Causal attention of Q queries per sequence over a KV cache indexed by position.

    Args:
        q: [B, Q, Hq, D].
        k_cache: [rows, S, Hkv, D], contiguous in the last dimension; Hkv divides Hq.
        v_cache: [rows, S, Hkv, Dv], likewise.
        positions: [B, Q] int64. A query at p sees positions max(0, p - window + 1)..p; one at a
            negative position returns zeros.
        scale: multiplies the scores.
        window: sliding window; <= 0 for full attention.
        sinks: [Hq] logits that take part in the softmax's sum (gpt-oss).
        rows: [B] int64 cache row of each sequence; None for row b.

    Returns:
        [B, Q, Hq, Dv] contiguous, in q.dtype; scores and sums in fp32.
    """
    _require()
    return torch.ops.moesd.ragged_attention(
        q, k_cache, v_cache, positions, scale, window, sinks, rows
    )


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to x.dtype, times w: transformers' RMSNorm."""
    _require()
    return torch.ops.moesd.rms_norm(x, w, eps)


def add_rms_norm(x: Tensor, delta: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, rounded to x.dtype, and its :func:`rms_norm`: one pass where two would go."""
    _require()
    return torch.ops.moesd.add_rms_norm(x, delta, w, eps)


def rope_to_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: tuple[Tensor, float] | None,
    k_norm: tuple[Tensor, float] | None,
    index: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Per-head norms and rotary positions of a joined projection; keys and values go to the cache.

    Rounds to the storage dtype after every step at which transformers' separate operations do.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D] contiguous: query heads, key heads, value heads.
        cos: [T, D] in qkv.dtype, of each token's position; sin: likewise.
        q_norm: weight [D] and epsilon of the query heads' RMS norm, or None; k_norm: the keys'.
        index: [T] int64, the cache row of each token.
        keys: [rows, Hkv * D], written at `index`; values: likewise.

    Returns:
        Queries [T, Hq, D].
    """
    _require()
    D = cos.shape[-1]
    kv_heads = keys.shape[-1] // D
    q_heads = qkv.shape[-1] // D - 2 * kv_heads
    norms = [*(q_norm or (None, 0.0)), *(k_norm or (None, 0.0))]
    return torch.ops.moesd.rope_to_cache(
        qkv, cos, sin, *norms, index, q_heads, kv_heads, keys, values
    )


def act_and_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of one shape, computed in fp32, as transformers' dense MLPs round it.

    The activation is rounded to the dtype of `gate` before the product. Names as in
    :func:`experts`.
    """
    _require()
    return torch.ops.moesd.act_and_mul(gate, up, activation)


def softmax_topk_router(
    x: Tensor, w: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over x [T, H] times w [E, H] and its top_k, as transformers' TopKRouter classes.

    The logits are rounded to x.dtype before the fp32 softmax; among equal probabilities the lower
    id comes first. Weights stay fp32, also where a model rounds them to x.dtype afterwards.

    Returns:
        Logits [T, E], weights [T, top_k] fp32 and ids [T, top_k] int64.
    """
    _require()
    return torch.ops.moesd.softmax_topk_router(x, w, top_k, renormalize)


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the largest of x [..., V] is: int64 [...], the lowest place among equals, NaN largest.

    Returns:
        The places, and bool [...]: rows that have no largest value, only NaN or -inf.
    """
    _require()
    return torch.ops.moesd.argmax(x)


def _require() -> None:
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("moesd::experts")
    def _(hidden, w_gate_up, w_down, topk_ids, topk_weights, *rest):
        return None

    @fake("moesd::linear")
    def _(x, w, bias):
        return x.new_empty(x.shape[0], w.shape[0])

    @fake("moesd::ragged_attention")
    def _(q, k, v, positions, scale, window, sinks, rows):
        return q.new_empty(*q.shape[:3], v.shape[3])

    @fake("moesd::rms_norm")
    def _(x, w, eps):
        return x.new_empty(x.shape)

    @fake("moesd::add_rms_norm")
    def _(x, delta, w, eps):
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @fake("moesd::rope_to_cache")
    def _(qkv, cos, sin, q_norm, q_eps, k_norm, k_eps, index, q_heads, kv_heads, keys, values):
        return qkv.new_empty(qkv.shape[0], q_heads, cos.shape[1])

    @fake("moesd::act_and_mul")
    def _(gate, up, activation):
        return gate.new_empty(gate.shape)

    @fake("moesd::softmax_topk_router")
    def _(x, w, top_k, renormalize):
        logits = x.new_empty(x.shape[0], w.shape[0])
        weights = x.new_empty(x.shape[0], top_k, dtype=torch.float32)
        return logits, weights, x.new_empty(x.shape[0], top_k, dtype=torch.int64)

    @fake("moesd::argmax")
    def _(x):
        ids = x.new_empty(x.shape[:-1], dtype=torch.int64)
        return ids, x.new_empty(x.shape[:-1], dtype=torch.bool)
