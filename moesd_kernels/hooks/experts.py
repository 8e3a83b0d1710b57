"""Our expert layer inside transformers models, through their experts interface.

``register()`` adds the name, ``accelerate(model)`` switches a loaded model to it. What the fast
path does not cover runs transformers' own ``grouped_mm`` on the same weights, and is said once per
reason. Nothing is written onto the model's modules: decisions live in a weak table beside them.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moesd_kernels.experts.api import fused_experts, needs_grad
from moesd_kernels.experts.spec import DEFAULT_SPEC, OPTIONS, ExpertsSpec

from .gates import recognise_gate

logger = logging.getLogger(__name__)

# Above this many tokens per expert a GPU is compute-bound and large-tile GEMMs win.
LARGE_TOKENS_PER_EXPERT = 512

_OPTION_NAMES = tuple(option.name for option in OPTIONS)
_PLAIN = (nn.Parameter, Tensor)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")


class ModuleSpec(NamedTuple):
    """What one experts module computes.

    Attributes:
        refusal: why it cannot be run by us at all, or None.
        spec: the options of ``fused_experts``.
        has_bias: whether both projections have one.
    """

    refusal: str | None
    spec: ExpertsSpec = DEFAULT_SPEC
    has_bias: bool = False


class Settings(NamedTuple):
    """Choices of the caller of ``accelerate``."""

    backend: str = "auto"
    batch_invariant: bool = False


_specs: weakref.WeakKeyDictionary[nn.Module, ModuleSpec] = weakref.WeakKeyDictionary()
_settings: weakref.WeakKeyDictionary[nn.Module, Settings] = weakref.WeakKeyDictionary()
_DEFAULTS = Settings()
_said: set[str] = set()

Model = TypeVar("Model", bound=nn.Module)


def register(name: str = "moesd") -> None:
    """Make ``experts_implementation=name`` valid in transformers; calling it again is harmless.

    Raises:
        ImportError: transformers is not installed, or has no experts interface.
    """
    from transformers.integrations.moe import ExpertsInterface

    # Dynamo runs this once while tracing and inlines what it returns.
    torch._dynamo.assume_constant_result(_decisions_at)
    ExpertsInterface.register(name, experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:  # before FP8 experts had a registry of their own
        return
    FP8ExpertsInterface.register(name, _refuse_fp8)


def accelerate(
    model: Model,
    *,
    dense: str | bool = "auto",
    backend: str = "auto",
    batch_invariant: bool = False,
) -> Model:
    """Run the experts of a transformers model on our kernels; returns ``model``.

    Weights stay where they are, in their own layout, so ``save_pretrained`` is unaffected. A model
    without experts is left as it is, except for ``dense``.

    Args:
        model: a transformers model.
        dense: also run linear layers, RMS norms and softmax routers on our CPU kernels, whose rows
            do not depend on each other: True, False, or "auto" for where those kernels can run.
        backend: back-end of the experts; see ``moesd_kernels.fused_experts``.
        batch_invariant: make experts rows independent of the rest of the batch on every device.

    Raises:
        ValueError: ``dense`` is not "auto", True or False.
        RuntimeError: ``dense`` is True and the CPU kernels cannot run; the message says why.
    """
    from .dense import accelerate_dense

    if dense not in ("auto", True, False):
        raise ValueError(f"dense must be 'auto', True or False, got {dense!r}")
    register()
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("moesd")  # type: ignore[operator]
        for module in model.modules():
            if hasattr(module, "_apply_gate") or hasattr(module, "is_concatenated"):
                _settings[module] = Settings(backend, batch_invariant)
                _specs[module] = read_spec(module)
    if dense is not False:
        accelerate_dense(model, required=dense is True)
    return model


def decelerate(model: Model) -> Model:
    """Undo ``accelerate``: transformers' default experts and the modules' own forwards."""
    from .dense import decelerate_dense

    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    decelerate_dense(model)
    return model


def read_spec(experts: nn.Module) -> ModuleSpec:
    """Read an experts module's flags and recognise its gate."""
    if getattr(experts, "has_post_expert_norm", False):
        return ModuleSpec("experts have a norm after the down projection")
    gated = getattr(experts, "has_gate", True)
    interleaved = not getattr(experts, "is_concatenated", True)
    spec = recognise_gate(experts, gated, interleaved)
    if spec is None:
        return ModuleSpec(f"the gate of {type(experts).__name__} is not one of the fused ones")
    spec = replace(spec, transposed=getattr(experts, "is_transposed", False))
    return ModuleSpec(None, spec, getattr(experts, "has_bias", False))


def spec_of(experts: nn.Module) -> ModuleSpec:
    """What the module computes, made at its first use."""
    found = _specs.get(experts)
    if found is None:
        found = _specs[experts] = read_spec(experts)
    return found


def settings_of(experts: nn.Module) -> Settings:
    """What the caller of ``accelerate`` chose for this module."""
    return _settings.get(experts, _DEFAULTS)


def _decisions_at(address: int) -> tuple[str | None, bool, tuple[Any, ...], Settings]:
    """Refusal, bias, values of ``OPTIONS`` and settings of the module whose ``id`` this is.

    Only Dynamo calls it, with a module it guards: torch 2.11's passes numbers but no modules to a
    function whose result is a constant, and takes plain values but no specs from it.
    """
    experts = ctypes.cast(address, ctypes.py_object).value
    refusal, spec, has_bias = spec_of(experts)
    values = tuple(getattr(spec, option.name) for option in OPTIONS)
    return refusal, has_bias, values, settings_of(experts)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function behind ``experts_implementation="moesd"``.

    Args:
        self: an experts module of transformers.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]``; an id outside the module's experts contributes nothing.
        top_k_weights: ``[T, K]``.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.
    """
    if torch.compiler.is_compiling():
        refusal, has_bias, values, settings = _decisions_at(id(self))
        computed: dict[str, Any] = dict(zip(_OPTION_NAMES, values, strict=True))
        gated = computed["gated"]
    else:
        (refusal, spec, has_bias), settings = spec_of(self), settings_of(self)
        computed, gated = {"spec": spec}, spec.gated
    w_gate_up = self.gate_up_proj if gated else self.up_proj
    w_down = self.down_proj
    reason = refusal or _call_refusal(hidden_states, w_gate_up, w_down, top_k_weights)
    if reason is not None:
        return _hand_over(self, hidden_states, top_k_index, top_k_weights, reason)
    gate_up_bias = down_bias = None
    if has_bias:
        gate_up_bias = self.gate_up_proj_bias if gated else self.up_proj_bias
        down_bias = self.down_proj_bias
    return fused_experts(
        hidden_states,
        w_gate_up,
        w_down,
        top_k_index,
        top_k_weights,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        backend=settings.backend,
        batch_invariant=settings.batch_invariant,
        **computed,
    )


def _call_refusal(
    hidden_states: Tensor, w_gate_up: Tensor, w_down: Tensor, top_k_weights: Tensor
) -> str | None:
    """Why this call cannot take the fast path, or None."""
    if type(w_gate_up) not in _PLAIN or type(w_down) not in _PLAIN:
        kinds = f"{type(w_gate_up).__name__} and {type(w_down).__name__}"
        return f"expert weights are {kinds}, not plain tensors"
    dtype = hidden_states.dtype
    if w_gate_up.dtype != dtype or w_down.dtype != dtype or dtype not in _DTYPES:
        return f"expert weights are {w_gate_up.dtype} and hidden states {dtype}"
    if needs_grad(hidden_states, w_gate_up, w_down, top_k_weights):
        return "gradients are needed (run under torch.inference_mode() or torch.no_grad())"
    device = hidden_states.device.type
    if device not in _DEVICES:
        return f"no kernels for device {device!r}"
    if device == "cuda" and hidden_states.shape[0] > LARGE_TOKENS_PER_EXPERT * w_down.shape[0]:
        return f"more than {LARGE_TOKENS_PER_EXPERT} tokens per expert"
    return None


def _hand_over(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, reason: str
) -> Tensor:
    """transformers' ``grouped_mm`` on the same module."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        logger.warning("experts run transformers' grouped_mm: %s", reason)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)


def _refuse_fp8(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What transformers' separate registry for FP8 experts finds under our name."""
    raise NotImplementedError(
        "moesd has kernels for bfloat16, float16 and float32 experts, got FP8 experts "
        f"({type(self).__name__}); load the model with experts_implementation='grouped_mm'"
    )
