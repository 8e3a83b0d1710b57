"""``fused_experts``: the checked, dispatching entry to the expert layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from moesd_kernels.transforms import is_transformed

from .backends import CallTraits, QuickRun, choose_backend
from .spec import DEFAULT_SPEC, OPTIONS, ExpertsSpec, ExpertsWeights, TopK
from .validation import check_arguments


def fused_experts(
    hidden_states: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    spec: ExpertsSpec | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``out[t] = sum_k topk_weights[t, k] * down(act(gate(x[t])) * up(x[t]))`` of expert ids[t, k].

    Args:
        hidden_states: ``[T, H]`` bf16, fp16 or fp32; T may be 0.
        w_gate_up: ``[E, 2I, H]``, gate rows first; ``[E, I, H]`` when not gated; not copied.
        w_down: ``[E, H, I]``. In a quantised ``weight_format``, ``down_format``, they are stored as
            that says, and stand for what ``formats.dequantize`` gives in hidden_states' dtype.
        topk_ids: ``[T, K]`` int32 or int64; one outside [0, E) contributes nothing, a double twice.
        topk_weights: ``[T, K]`` fp32, bf16 or fp16; multiplied in fp32.
        gate_up_bias: ``[E, 2I]`` (or ``[E, I]``) in the dtype of ``hidden_states``.
        down_bias: ``[E, H]`` in the dtype of ``hidden_states``.
        gate_up_scale: scales of ``w_gate_up``, where the format has them; down_scale: likewise.
        spec: what the experts compute.
        backend: "auto", or a name from ``moesd_kernels.available_backends``.
        batch_invariant: make a token's row bit-identical whatever other rows are in the call.
        out: ``[T, H]`` to write into; must not share memory with an input.
        options: fields of ``moesd_kernels.ExpertsSpec``, instead of ``spec``.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``: ``out`` when given. The K terms are summed in
        fp32 in a fixed order: the same from run to run.

    Raises:
        TypeError: a dtype does not match or is not supported, or an option is unknown.
        ValueError: shapes, devices or options do not fit together, or a name is unknown.
        RuntimeError: the named back-end cannot run here, or not on this call.
    """
    tensors = (hidden_states, w_gate_up, w_down, topk_ids, topk_weights, gate_up_bias, down_bias)
    scales = gate_up_scale, down_scale
    if options and spec is not None:
        raise TypeError(f"give spec or single options, got {spec} and {sorted(options)}")
    if is_compiling():
        return _traced((*tensors, *scales), spec, options, backend, batch_invariant, out)
    if spec is None:
        spec = _make_spec(**options) if options else DEFAULT_SPEC
    quick = _quick.get(backend)
    if quick is not None and out is None and not is_transformed():
        result = quick(*tensors, *spec.op_options, *scales)
        if result is not None:
            return result
    weights = ExpertsWeights(w_gate_up, w_down, gate_up_bias, down_bias, *scales)
    routed = TopK(topk_ids, topk_weights)
    return _checked(hidden_states, weights, routed, spec, out, backend, batch_invariant)


def _checked(
    x: Tensor,
    weights: ExpertsWeights,
    routing: TopK,
    spec: ExpertsSpec,
    out: Tensor | None,
    backend: str,
    batch_invariant: bool,
) -> Tensor:
    """The call on the back-end that is chosen for it, after every check."""
    check_arguments(x, weights, routing, spec, out)
    traits = CallTraits(
        x.device.type,
        x.dtype,
        needs_grad(x, *weights, *routing),
        all(weight is None or weight.is_contiguous() for weight in weights[:2] + weights[4:]),
        batch_invariant,
        spec.formats,
        spec.rounds_activations,
    )
    chosen = choose_backend(backend, traits)
    if chosen.quick is not None:
        _quick[backend] = chosen.quick()
    return chosen.load()(x, weights, routing, spec, out, batch_invariant=batch_invariant)


_DEFAULTS = {option.name: option.default for option in OPTIONS}
_make_spec = functools.lru_cache(maxsize=256)(ExpertsSpec)

# By the name it was asked for: the quick way of the back-end that was chosen before. It is tried
# first from then on, and says itself that a call is not its own.
_quick: dict[str, QuickRun] = {}


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return is_transformed() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


def _public_signature() -> inspect.Signature:
    """The signature with every option by name, as ``help`` shows it."""
    signature = inspect.signature(fused_experts)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named += [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=option.type,
        )
        for option in OPTIONS
    ]
    return signature.replace(parameters=named)


fused_experts.__signature__ = _public_signature()  # type: ignore[attr-defined]

# torch.compile must not look into a back-end: it reads routing on the host or launches kernels of
# its own. In eager mode the op is not used, because its dispatch costs as much as a small layer.
_LIBRARY = torch.library.Library("moesd", "FRAGMENT")
_SCHEMA_TYPES = {"str": "str", "bool": "bool", "float | None": "float?", "str | None": "str?"}
_LIBRARY.define(
    "fused_experts(Tensor hidden_states, Tensor w_gate_up, Tensor w_down, Tensor topk_ids, "
    "Tensor topk_weights, Tensor? gate_up_bias, Tensor? down_bias, Tensor? gate_up_scale, "
    "Tensor? down_scale, "
    + "".join(f"{_SCHEMA_TYPES[str(option.type)]} {option.name}, " for option in OPTIONS)
    + "str backend, bool batch_invariant) -> Tensor",
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
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    *rest: Any,
) -> Tensor:
    *options, backend, batch_invariant = rest
    return fused_experts(
        hidden_states,
        w_gate_up,
        w_down,
        topk_ids,
        topk_weights,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        spec=_make_spec(*options),
        backend=backend,
        batch_invariant=batch_invariant,
    )


@torch.library.register_fake("moesd::fused_experts", lib=_LIBRARY)
def _fused_experts_fake(hidden_states: Tensor, *args: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _traced(
    tensors: tuple[Tensor | None, ...],
    spec: ExpertsSpec | None,
    options: Mapping[str, Any],
    backend: str,
    batch_invariant: bool,
    out: Tensor | None,
) -> Tensor:
    """The call as one op of a compiled graph, where no spec can be made: the op makes it."""
    unknown = [name for name in options if name not in _DEFAULTS]
    if unknown:
        raise TypeError(f"fused_experts() got an unexpected option {unknown[0]!r}")
    if needs_grad(*tensors):
        raise RuntimeError(
            "fused_experts inside torch.compile has no backward pass; call it under torch.no_grad()"
        )
    if spec is None:
        values = [options.get(name, default) for name, default in _DEFAULTS.items()]
    else:
        values = [*spec.op_options]
    result = torch.ops.moesd.fused_experts(*tensors, *values, backend, batch_invariant)
    return result if out is None else out.copy_(result)
