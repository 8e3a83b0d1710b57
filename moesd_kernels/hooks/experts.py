"""Our expert layer inside transformers models, through their experts interface.

``register()`` adds the name. What the fast path does not cover runs transformers' own
``grouped_mm`` on the same weights, and is said once per reason. What a module computes lives in a
weak table beside it; only what the caller chose is written onto it, so that copies have it too.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesd_kernels.experts.api import fused_experts, needs_grad
from moesd_kernels.experts.spec import DEFAULT_SPEC, OPTIONS, ExpertsSpec
from moesd_kernels.transforms import is_transformed

from .gates import ALPHA_NAMES, LIMIT_NAMES, recognise_gate
from .packed import DOWN_FORMAT, FORMAT, INT8_ACTIVATIONS, StoredExperts, scale_of, stored_experts
from .shadow import DTYPES, is_plain

logger = logging.getLogger(__name__)

# Above this many tokens per expert a GPU is compute-bound and large-tile GEMMs win.
LARGE_TOKENS_PER_EXPERT = 512

_FORMATS = FORMAT, DOWN_FORMAT, INT8_ACTIVATIONS
_SOURCES = ("act_fn", "is_transposed", *_FORMATS, *LIMIT_NAMES, *ALPHA_NAMES)
_OPTION_NAMES = tuple(option.name for option in OPTIONS)
_PLAIN = (nn.Parameter, Tensor)
_DEVICES = ("cpu", "cuda")


class ModuleSpec(NamedTuple):
    """What one experts module computes.

    Attributes:
        refusal: why it cannot be run by us at all, or None.
        spec: the options of ``fused_experts``.
        has_bias: whether both projections have one.
        stored: how the projections lie.
    """

    refusal: str | None
    spec: ExpertsSpec = DEFAULT_SPEC
    has_bias: bool = False
    stored: StoredExperts = StoredExperts()


class Settings(NamedTuple):
    """Choices of the caller of ``accelerate``."""

    backend: str = "auto"
    batch_invariant: bool = False


# With the parts and numbers of the module that the spec was read from.
_Read = tuple[tuple[Any, ...], ModuleSpec]
_specs: weakref.WeakKeyDictionary[nn.Module, _Read] = weakref.WeakKeyDictionary()
_DEFAULTS = Settings()
SETTINGS = "_moesd_settings"  # a module's attribute, where they are not the defaults
_said: set[str] = set()


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
    FP8ExpertsInterface.register(name, experts_forward)


def read_spec(experts: nn.Module) -> ModuleSpec:
    """Read an experts module's flags and recognise its gate."""
    if getattr(experts, "has_post_expert_norm", False):
        return ModuleSpec("experts have a norm after the down projection")
    stored = stored_experts(experts)
    if stored.refusal is not None:
        return ModuleSpec(stored.refusal, stored=stored)
    if not _has_plain_activation(experts):
        return ModuleSpec("their activation has a hook or a forward of its own", stored=stored)
    gated = getattr(experts, "has_gate", True)
    interleaved = not getattr(experts, "is_concatenated", True)
    spec = recognise_gate(experts, gated, interleaved)
    if spec is None:
        name = type(experts).__name__
        return ModuleSpec(f"the gate of {name} is not one of the fused ones", stored=stored)
    spec = replace(
        spec,
        transposed=getattr(experts, "is_transposed", False),
        weight_format=stored.weight_format,
        down_format=stored.down_format,
        int8_activations=stored.int8_activations,
    )
    return ModuleSpec(None, spec, getattr(experts, "has_bias", False), stored)


def spec_of(experts: nn.Module) -> ModuleSpec:
    """What the module computes, made at its first use and when its activation has changed."""
    state = experts.__dict__
    activation = experts._modules.get("act_fn"), _has_plain_activation(experts)
    source = (type(experts), *activation, *map(state.get, _SOURCES))
    found = _specs.get(experts)
    if found is None or found[0] != source:
        found = _specs[experts] = source, read_spec(experts)
    return found[1]


def _has_plain_activation(experts: nn.Module) -> bool:
    act_fn = experts._modules.get("act_fn")
    return act_fn is None or is_plain(act_fn)


def settings_of(experts: nn.Module) -> Settings:
    """What the caller of ``accelerate`` chose for this module."""
    settings: Settings = experts.__dict__.get(SETTINGS, _DEFAULTS)
    return settings


def choose(experts: nn.Module, settings: Settings) -> None:
    """Let ``settings_of`` this module, and of its copies, be these."""
    if settings == _DEFAULTS:
        experts.__dict__.pop(SETTINGS, None)
    else:
        experts.__dict__[SETTINGS] = settings


def _decisions_at(address: int) -> tuple[Any, ...]:
    """Refusal, bias, storage, values of ``OPTIONS`` and settings of the module with this ``id``.

    Only Dynamo calls it, with a module it guards: torch 2.11's passes numbers but no modules to a
    function whose result is a constant, and takes plain values but no specs from it.
    """
    experts = ctypes.cast(address, ctypes.py_object).value
    refusal, spec, has_bias, stored = spec_of(experts)
    values = tuple(getattr(spec, option.name) for option in OPTIONS)
    return refusal, has_bias, stored, values, settings_of(experts)


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
        refusal, has_bias, stored, values, settings = _decisions_at(id(self))
        computed: dict[str, Any] = dict(zip(_OPTION_NAMES, values, strict=True))
        gated = computed["gated"]
    else:
        (refusal, spec, has_bias, stored), settings = spec_of(self), settings_of(self)
        computed, gated = {"spec": spec}, spec.gated
    w_gate_up = self.gate_up_proj if gated else self.up_proj
    w_down = self.down_proj
    if stored.plain and stored.refusal is None:
        reason = refusal or _call_refusal(hidden_states, w_gate_up, w_down, top_k_weights)
        if reason is not None:
            return _hand_over(self, hidden_states, top_k_index, top_k_weights, reason)
    elif refusal is not None:  # there is nobody else to read these weights
        raise NotImplementedError(f"moesd cannot run {type(self).__name__}: {refusal}")
    else:
        first = "gate_up_proj" if gated else "up_proj"
        computed["gate_up_scale"] = scale_of(self, first, stored)
        computed["down_scale"] = scale_of(self, "down_proj", stored)
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
    if w_gate_up.dtype != dtype or w_down.dtype != dtype or dtype not in DTYPES:
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
    """transformers' ``grouped_mm`` on the same module, or ``batched_mm`` for what that lacks."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    lacks = hidden_states.dtype == torch.float64 or is_transformed()
    name = "batched_mm" if lacks else "grouped_mm"
    if not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        logger.warning("experts run transformers' %s: %s", name, reason)
    return ALL_EXPERTS_FUNCTIONS[name](self, hidden_states, top_k_index, top_k_weights)
