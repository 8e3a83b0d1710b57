"""The CUDA C++ back-end: a persistent swap-AB kernel for Hopper in bf16.

On an H200 its results are right, and the Triton kernels are faster at every point measured
(``bench/results/h200``), so ``backend="auto"`` never chooses it. It takes silu-gated experts in
transformers' default layout, H and I multiples of 64, at most 8192 routed rows; everything else
raises.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moesd_kernels import library

from .spec import OPTIONS, ExpertsSpec, ExpertsWeights, TopK

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
        RuntimeError: the operators could not be built or loaded.
    """
    # The CPU's library holds the schema that the CUDA kernel implements.
    reason = library.load("cpu") or library.load("cuda")
    if reason is not None:
        raise RuntimeError(reason)


def fused_experts_cuda(
    x: Tensor,
    weights: ExpertsWeights,
    routing: TopK,
    spec: ExpertsSpec,
    out: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """``fused_experts`` by ``csrc/cuda``; arguments as there, already checked.

    Raises:
        NotImplementedError: the call needs what this kernel does not have; the message says what.
        RuntimeError: the operators could not be built.
    """
    refusal = _refusal(x, weights, routing, spec, batch_invariant)
    if refusal is not None:
        raise NotImplementedError(f"backend 'cuda': {refusal}")
    _load()
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.moesd.experts(
        x.contiguous(),
        weights.gate_up,
        weights.down,
        routing.ids.contiguous(),
        routing.weights.contiguous(),
        weights.gate_up_bias,
        weights.down_bias,
        *spec.op_options,
        None,
        None,
        result,
    )
    return result if out is None else out.copy_(result)


def _refusal(
    x: Tensor, weights: ExpertsWeights, routing: TopK, spec: ExpertsSpec, batch_invariant: bool
) -> str | None:
    """What this kernel does not have that the call needs, or None."""
    if spec.formats != ("plain", "plain"):
        return f"it reads plain weights, got {' and '.join(spec.formats)}"
    unusual = [o.name for o in OPTIONS if getattr(spec, o.name) != o.default]
    unusual += [n for n in ("gate_up_bias", "down_bias") if getattr(weights, n) is not None]
    if unusual:
        return f"only silu-gated weights in two halves without bias; got other {unusual}"
    if x.dtype != torch.bfloat16:
        return f"hidden_states must be torch.bfloat16, got {x.dtype}"
    H, I = x.shape[1], weights.down.shape[-1]
    if H % 64 or I % 64:
        return f"H and I must be multiples of 64, got {H} and {I}"
    if routing.ids.numel() > MAX_PAIRS:
        return f"at most {MAX_PAIRS} routed rows, got {routing.ids.numel()}"
    if batch_invariant:
        return "that its rows do not depend on the batch has not been shown on a GPU"
    return None
