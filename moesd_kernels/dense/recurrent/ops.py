"""The operators as they are called: compiled where they can be, in PyTorch otherwise.

Shapes and dtypes are checked by the compiled ones, which take float32, bfloat16 and float16;
gradients are not supported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesd_kernels.dense import ops

from . import convolution, delta_rule, gated_norm, mamba, mamba2

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    states: Tensor,
    rows: Tensor,
    keep: Tensor,
    counts: Tensor,
) -> Tensor:
    """The gated delta rule of Qwen3-Next, Qwen3.5 and OLMo-hybrid, and Kimi Delta Attention.

    ``S = exp(decay) S``, then ``S += k (beta (v - k S))``; the output is ``q S / sqrt(Dk)``, all in
    fp32. Queries and keys are first divided by their norms, as all of these models do.

    Args:
        query: ``[B, Q, Hk, Dk]`` in float32, bfloat16 or float16; Hk divides Hv, and consecutive
            value heads share a key head. Tokens may lie anywhere, also those of key and value.
        key: ``[B, Q, Hk, Dk]`` in query.dtype.
        value: ``[B, Q, Hv, Dv]`` in query.dtype.
        decay: ``[B, Q, Hv]`` floating, the logarithm of what remains of the state, or one for each
            key channel, ``[B, Q, Hv, Dk]`` (Kimi).
        beta: ``[B, Q, Hv]`` floating, how far the state moves to the value.
        states: ``[R, Hv, Dk, Dv]`` float32 contiguous, written.
        rows: ``[B]`` int64 row of each sequence's state.
        keep: ``[B]`` int64, how many tokens are accepted, 0..counts[b].
        counts: ``[B]`` int64, how many tokens there are, 0..Q.

    Returns:
        ``[B, Q, Hv, Dv]`` contiguous in value.dtype, zeros where there is no token.

    Raises:
        TypeError, ValueError, IndexError: dtypes, shapes, counts or rows differ from these.
    """
    run = torch.ops.moesd.gated_delta_rule if _compiled(value) else delta_rule.gated_delta_rule
    return run(query, key, value, decay, beta, states, rows, keep, counts)


def selective_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    states: Tensor,
    rows: Tensor,
    keep: Tensor,
    counts: Tensor,
) -> Tensor:
    """Mamba-2's state space: ``S = exp(dt A) S + (dt x) B``, output ``S C + D x``, all in fp32.

    Args:
        x: ``[B, Q, Hh, P]`` in float32, bfloat16 or float16. Tokens may lie anywhere, also those
            of B and C.
        dt: ``[B, Q, Hh]`` floating, after bias, softplus and limits.
        A: ``[Hh]`` floating, negative.
        B: ``[B, Q, G, N]`` in x.dtype; G divides Hh, and consecutive heads share a group.
        C: ``[B, Q, G, N]`` in x.dtype.
        D: ``[Hh]`` floating, the skip connection.
        states: ``[R, Hh, P, N]`` float32 contiguous, written.
        rows: ``[B]`` int64 row of each sequence's state.
        keep: ``[B]`` int64, how many tokens are accepted, 0..counts[b].
        counts: ``[B]`` int64, how many tokens there are, 0..Q.

    Returns:
        ``[B, Q, Hh, P]`` contiguous in x.dtype, zeros where there is no token.

    Raises:
        TypeError, ValueError, IndexError: dtypes, shapes, counts or rows differ from these.
    """
    compiled = _compiled(x)
    run = torch.ops.moesd.selective_state_update if compiled else mamba2.selective_state_update
    return run(x, dt, A, B, C, D, states, rows, keep, counts)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    states: Tensor,
    rows: Tensor,
    keep: Tensor,
    counts: Tensor,
) -> Tensor:
    """Mamba-1's state space, channel by channel; the gate behind it is not part of it.

    Args:
        x: ``[B, Q, channels]`` in float32, bfloat16 or float16. Tokens may lie anywhere, also
            those of B and C.
        dt: ``[B, Q, channels]`` floating, after bias and softplus.
        A: ``[channels, N]`` floating, negative.
        B: ``[B, Q, N]`` in x.dtype, for all channels.
        C: ``[B, Q, N]`` in x.dtype.
        D: ``[channels]`` floating, the skip connection.
        states: ``[R, channels, N]`` float32 contiguous, written.
        rows: ``[B]`` int64 row of each sequence's state.
        keep: ``[B]`` int64, how many tokens are accepted, 0..counts[b].
        counts: ``[B]`` int64, how many tokens there are, 0..Q.

    Returns:
        ``[B, Q, channels]`` contiguous in x.dtype, zeros where there is no token.

    Raises:
        TypeError, ValueError, IndexError: dtypes, shapes, counts or rows differ from these.
    """
    run = torch.ops.moesd.selective_scan if _compiled(x) else mamba.selective_scan
    return run(x, dt, A, B, C, D, states, rows, keep, counts)


def short_convolution(
    window: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Depthwise causal convolution over the last W inputs: sums in fp32, rounded, activated.

    Args:
        window: ``[B, W - 1 + Q, C]`` in float32, bfloat16 or float16: the W - 1 inputs before the
            first token, zeros where there were none, and the tokens. Tokens may lie anywhere.
        weight: ``[C, W]`` contiguous in window.dtype.
        bias: ``[C]`` contiguous in window.dtype.
        activation: a key of ``experts.spec.activations.FUNCTIONS`` ("silu").

    Returns:
        ``[B, Q, C]`` contiguous in window.dtype.

    Raises:
        TypeError, ValueError: dtypes, shapes or the activation differ from these.
    """
    compiled = _compiled(window)
    run = torch.ops.moesd.short_convolution if compiled else convolution.short_convolution
    return run(window, weight, bias, activation)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    w: Tensor,
    eps: float,
    *,
    group: int,
    gate_first: bool = False,
    cast_first: bool = True,
    activation: str = "silu",
) -> Tensor:
    """What recurrent layers put behind their recurrence, in fp32: transformers' RMSNormGated.

    ``w * x / rms(x) * act(gate)``, the mean of squares being that of each group of x.

    Args:
        x: ``[..., H]`` in float32, bfloat16 or float16.
        gate: ``[..., H]`` in x.dtype.
        w: ``[H]``, or ``[group]`` for every group, contiguous in x.dtype.
        eps: added to the mean.
        group: numbers that share a norm; divides H, at most 16384.
        gate_first: multiply by the gate before the norm (Mamba-2), not after it.
        cast_first: round the norm to x.dtype before the product, and that before a gate's, too
            (Qwen3-Next, Mamba-2), not only the result (Kimi-Linear, Falcon-H1).
        activation: "silu" or "sigmoid".

    Returns:
        ``[..., H]`` contiguous in x.dtype.

    Raises:
        TypeError, ValueError: dtypes, shapes or the activation differ from these.
    """
    run = torch.ops.moesd.gated_rms_norm if _compiled(x) else gated_norm.gated_rms_norm
    return run(x, gate, w, eps, group, gate_first, cast_first, activation)


def _compiled(x: Tensor) -> bool:
    """Whether there is a compiled operator for tensors such as x.

    ``torch.compile`` cannot trace how the library is loaded: it must have been before.
    """
    if x.device.type not in ("cpu", "cuda") or x.dtype not in _DTYPES:
        return False
    return torch.compiler.is_compiling() or ops.unavailable() is None
