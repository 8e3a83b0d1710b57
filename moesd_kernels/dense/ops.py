"""The C++ CPU operators of a step's dense part, ``torch.ops.moesd.*``, as typed Python functions.

Every function computes a row from that row alone, bit for bit: whatever else is in the batch, in
which order, and on how many threads. ``unavailable()`` says why they cannot be called, if so.
Shapes and dtypes are checked in C++ (``csrc/cpu``); gradients are not supported.

``B`` sequences, ``T`` tokens, ``E`` experts, ``K`` experts per token, ``H`` hidden, ``I``
intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesd_kernels import library


def unavailable() -> str | None:
    """None when the operators are loaded (building them if needed), otherwise the reason."""
    return library.load("cpu")


def isa() -> str:
    """The instruction set in use: amx, avx512_bf16, avx512, avx2 or portable.

    Raises:
        RuntimeError: the operators are unavailable, or MOESD_CPU_ISA names an unknown or
            unsupported set.
    """
    _require()
    return torch.ops.moesd.cpu_isa()


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    weight_format: str = "plain",
    int8_activations: bool = False,
) -> Tensor:
    """x ``[T, K]`` times w ``[N, K]`` transposed, plus bias ``[N]``: fp32 sums, the result in
    x.dtype.

    Args:
        x: ``[T, K]``.
        w: ``[N, K]`` in x.dtype, or as ``weight_format`` stores it.
        bias: ``[N]`` in x.dtype.
        scale: what the format keeps beside w.
        weight_format: "plain" or another of ``torch.ops.moesd.weight_format_names()``. The product
            is that with the decoded weights, rounded to x.dtype, bit for bit.
        int8_activations: round x to eight bits before the product, where the format's weights are
            integers (``formats.WeightFormat.integers``); these are then not rounded to x.dtype. A
            scale is that of as many numbers as ``formats.activation_group`` says.
    """
    _require()
    return torch.ops.moesd.linear(x, w, bias, scale, weight_format, int8_activations)


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
        q: ``[B, Q, Hq, D]``.
        k_cache: [rows, S, Hkv, D], contiguous in the last dimension; Hkv divides Hq.
        v_cache: [rows, S, Hkv, Dv], likewise.
        positions: ``[B, Q]`` int64. A query at p sees positions max(0, p - window + 1)..p; one at a
            negative position returns zeros.
        scale: multiplies the scores.
        window: sliding window; <= 0 for full attention.
        sinks: ``[Hq]`` logits that take part in the softmax's sum (gpt-oss).
        rows: ``[B]`` int64 cache row of each sequence; None for row b.

    Returns:
        ``[B, Q, Hq, Dv]`` contiguous, in q.dtype; scores and sums in fp32.
    """
    _require()
    return torch.ops.moesd.ragged_attention(
        q, k_cache, v_cache, positions, scale, window, sinks, rows
    )


def rms_norm(
    x: Tensor, w: Tensor, eps: float, *, offset: float = 0.0, cast_first: bool = True
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times (w + offset), in fp32: transformers' RMSNorm classes.

    Args:
        x: ``[..., H]``.
        w: ``[H]`` in x.dtype.
        eps: added to the mean.
        offset: added to the weight (Gemma: 1).
        cast_first: round to x.dtype before the product, too (Llama), not only after it (gpt-oss).
    """
    _require()
    return torch.ops.moesd.rms_norm(x, w, eps, offset, cast_first)


def add_rms_norm(x: Tensor, delta: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, rounded to x.dtype, and its ``rms_norm``: one pass where two would go."""
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
        qkv: ``[T, (Hq + 2 Hkv) * D]`` contiguous: query heads, key heads, value heads.
        cos: ``[T, D]`` in qkv.dtype, of each token's position; sin: likewise.
        q_norm: weight ``[D]`` and epsilon of the query heads' RMS norm, or None; k_norm: the keys'.
        index: ``[T]`` int64, the cache row of each token.
        keys: [rows, Hkv * D], written at ``index``; values: likewise.

    Returns:
        Queries ``[T, Hq, D]``.
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

    The activation is rounded to the dtype of ``gate`` before the product; its name is a key of
    ``experts.spec.activations.FUNCTIONS``.
    """
    _require()
    return torch.ops.moesd.act_and_mul(gate, up, activation)


def softmax_topk_router(
    x: Tensor, w: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over x ``[T, H]`` times w ``[E, H]`` and its top_k, as transformers' TopKRouter
    classes.

    The logits are rounded to x.dtype before the fp32 softmax; among equal probabilities the lower
    id comes first. Weights stay fp32, also where a model rounds them to x.dtype afterwards.

    Returns:
        Logits ``[T, E]``, weights ``[T, top_k]`` fp32 and ids ``[T, top_k]`` int64.
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


def race(probs: Tensor, keys: Tensor) -> Tensor:
    """A draw from each of probs [..., V] fp32 on a CPU, int64 [...]: ``argmax(probs / Exp(1))``.

    The noise of keys [...] int64 is that of ``decoder.sampling.rng``, but for a logarithm's last
    bits; the lowest place wins among equals, and a probability of 0 never does.

    Args:
        probs: not negative, with positive mass, not necessarily normalised.
        keys: 64 random bits for each.
    """
    _require()
    return torch.ops.moesd.race(probs, keys)


def _require() -> None:
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
