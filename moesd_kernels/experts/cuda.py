"""The CUDA C++ back-end: a persistent swap-AB kernel for Hopper in bf16.

Compiled on every change, and its index arithmetic tested on the host, but **not run on a GPU yet**:
``backend="auto"`` never chooses it. It takes silu-gated experts in transformers' default layout,
H and I multiples of 64, at most 8192 routed rows; everything else raises.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moesd_kernels import library

MAX_PAIRS = 8192


def unavailable_reason() -> str | None:
    """Why the kernels cannot run in this process, or None. Compiles nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"compute capability is {torch.cuda.get_device_capability()}, (9, 0) is needed"
    return library.missing("cuda")


@functools.cache
def _load() -> None:
    """Load the operators, building them once if the package was built without them.

    Raises:
        RuntimeError: The operators could not be built or loaded.
    """
    # The CPU's library holds the schema that the CUDA kernel implements.
    reason = library.load("cpu") or library.load("cuda")
    if reason is not None:
        raise RuntimeError(reason)


def fused_experts_cuda(
    hidden_states: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    activation_limit: float | None = None,
    activation_alpha: float | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``fused_experts`` by ``csrc/cuda``; arguments as there, already checked.

    Raises:
        NotImplementedError: The call needs what this kernel does not have; the message says what.
        RuntimeError: The operators could not be built.
    """
    refusal = _refusal(
        hidden_states,
        topk_ids,
        w_down.shape[-1],
        batch_invariant,
        {
            "activation": activation != "silu",
            "gate_up_bias": gate_up_bias is not None,
            "down_bias": down_bias is not None,
            "gated": not gated,
            "interleaved": interleaved,
            "transposed": transposed,
            "activation_limit": activation_limit is not None,
            "activation_alpha": activation_alpha is not None,
        },
    )
    if refusal is not None:
        raise NotImplementedError(f"backend 'cuda': {refusal}")
    _load()
    result = torch.empty(
        hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device
    )
    torch.ops.moesd.experts(
        hidden_states.contiguous(),
        w_gate_up,
        w_down,
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        None,
        None,
        activation,
        gated,
        interleaved,
        transposed,
        None,
        None,
        result,
    )
    return result if out is None else out.copy_(result)


def _refusal(
    hidden_states: Tensor,
    topk_ids: Tensor,
    I: int,
    batch_invariant: bool,
    unusual: dict[str, bool],
) -> str | None:
    """What this kernel does not have that the call needs, or None."""
    options = [name for name, set_ in unusual.items() if set_]
    if options:
        return f"only silu-gated weights in two halves without bias; got other {options}"
    if hidden_states.dtype != torch.bfloat16:
        return f"hidden_states must be torch.bfloat16, got {hidden_states.dtype}"
    H = hidden_states.shape[1]
    if H % 64 or I % 64:
        return f"H and I must be multiples of 64, got {H} and {I}"
    if topk_ids.numel() > MAX_PAIRS:
        return f"at most {MAX_PAIRS} routed rows, got {topk_ids.numel()}"
    if batch_invariant:
        return "that its rows do not depend on the batch has not been shown on a GPU"
    return None
