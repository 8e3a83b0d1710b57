"""``fused_experts``: the checked, dispatching entry to the expert layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .activations import canonical_activation
from .backends import CallTraits, choose_backend
from .validation import check_arguments


def fused_experts(
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
    backend: str = "auto",
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``out[t] = sum_k topk_weights[t, k] * down(act(gate(x[t])) * up(x[t]))`` of expert ids[t, k].

    Args:
        hidden_states: [T, H] bf16, fp16 or fp32; T may be 0.
        w_gate_up: [E, 2I, H], gate rows first; [E, I, H] when not gated; used where it lies.
        w_down: [E, H, I].
        topk_ids: [T, K] int32 or int64. An id outside [0, E) contributes nothing (expert
            parallelism marks other ranks' experts so); an id may appear twice in a row.
        topk_weights: [T, K] fp32, bf16 or fp16; multiplied in fp32.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        gate_up_bias: [E, 2I] (or [E, I]) in the dtype of `hidden_states`.
        down_bias: [E, H] in the dtype of `hidden_states`.
        gated: Whether the first projection holds a gate.
        interleaved: Gate and up rows alternate (gpt-oss) instead of lying in two halves.
        transposed: Weights are [E, H, 2I] and [E, I, H].
        activation_limit: Clamp before the activation: gate from above, up on both sides.
        activation_alpha: Use gpt-oss's gate, ``gate * sigmoid(alpha * gate) * (up + 1)``.
        backend: "auto", or a name from :func:`moesd_kernels.available_backends`.
        batch_invariant: Make a token's row bit-identical whatever other rows are in the call.
        out: [T, H] to write into; must not share memory with an input.

    Returns:
        [T, H] in the dtype of `hidden_states`: `out` when given. The K terms are summed in fp32 in
        a fixed order, so that results are the same from run to run.

    Raises:
        TypeError: A dtype is not supported or does not match.
        ValueError: Shapes, devices or options do not fit together, or a name is unknown.
        RuntimeError: The named back-end cannot run here, or not on this call.
    """
    arguments = (
        *(hidden_states, w_gate_up, w_down, topk_ids, topk_weights, gate_up_bias, down_bias),
        *(activation, gated, interleaved, transposed, activation_limit, activation_alpha),
    )
    if is_compiling():
        return _traced(*arguments, backend, batch_invariant, out)
    direct = _direct.get(backend)
    if direct is not None and out is None:
        try:
            result = direct(*arguments)
        except (TypeError, ValueError, RuntimeError):
            result = None  # what follows says what is wrong, in this function's names
        if result is not None:
            return result
    activation = canonical_activation(activation)
    check_arguments(
        *(hidden_states, w_gate_up, w_down, topk_ids, topk_weights),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gated=gated,
        interleaved=interleaved,
        transposed=transposed,
        activation_limit=activation_limit,
        activation_alpha=activation_alpha,
        out=out,
    )
    tensors = (w_gate_up, w_down, topk_ids, topk_weights, gate_up_bias, down_bias)
    traits = CallTraits(
        hidden_states.device.type,
        hidden_states.dtype,
        needs_grad(hidden_states, *tensors),
        w_gate_up.is_contiguous() and w_down.is_contiguous(),
        batch_invariant,
    )
    function = choose_backend(backend, traits)
    if hasattr(function, "direct"):
        _direct[backend] = function.direct
    return function(
        *(hidden_states, w_gate_up, w_down, topk_ids, topk_weights),
        activation=activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gated=gated,
        interleaved=interleaved,
        transposed=transposed,
        activation_limit=activation_limit,
        activation_alpha=activation_alpha,
        batch_invariant=batch_invariant,
        out=out,
    )


# By the name it was asked for: the entry of a back-end that was chosen before and decides by
# itself, in compiled code, whether a call is its own. When the weights come from memory, so does
# the interpreter's code, and what it runs between two layers costs as much as a small one.
_direct: dict[str, Callable[..., Tensor | None]] = {}


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# torch.compile must not look into a back-end: it reads routing on the host or launches kernels of
# its own. In eager mode the op is not used, because its dispatch costs as much as a small layer.
_LIBRARY = torch.library.Library("moesd", "FRAGMENT")
_LIBRARY.define(
    "fused_experts(Tensor hidden_states, Tensor w_gate_up, Tensor w_down, Tensor topk_ids, "
    "Tensor topk_weights, Tensor? gate_up_bias, Tensor? down_bias, str activation, bool gated, "
    "bool interleaved, bool transposed, float? activation_limit, float? activation_alpha, "
    "str backend, bool batch_invariant) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@torch.library.impl(_LIBRARY, "fused_experts", "CompositeExplicitAutograd")
def _fused_experts_op(
    hidden_states: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    activation_limit: float | None,
    activation_alpha: float | None,
    backend: str,
    batch_invariant: bool,
) -> Tensor:
    return fused_experts(
        hidden_states,
        w_gate_up,
        w_down,
        topk_ids,
        topk_weights,
        activation=activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gated=gated,
        interleaved=interleaved,
        transposed=transposed,
        activation_limit=activation_limit,
        activation_alpha=activation_alpha,
        backend=backend,
        batch_invariant=batch_invariant,
    )


@torch.library.register_fake("moesd::fused_experts", lib=_LIBRARY)
def _fused_experts_fake(hidden_states: Tensor, *args: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _traced(*args: object) -> Tensor:
    """The call as one op of a compiled graph."""
    *inputs, out = args
    if needs_grad(*(arg for arg in inputs if isinstance(arg, Tensor))):
        raise RuntimeError(
            "fused_experts inside torch.compile has no backward pass; call it under torch.no_grad()"
        )
    result = torch.ops.moesd.fused_experts(*inputs)
    return result if out is None else out.copy_(result)  # type: ignore[attr-defined]
