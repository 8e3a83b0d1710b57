"""Switches a loaded transformers model to our kernels, and back.

What was taken over is said in one line per model. A refusal leaves the model as it was found.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from moesd_kernels.experts.backends import BACKENDS
from moesd_kernels.formats import WEIGHT_FORMATS

from .dense import accelerate_dense
from .experts import SETTINGS, Settings, choose, register, spec_of
from .shadow import require_model, unshadow

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Implementations = list[tuple[Any, str | None]]  # by config

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_said: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_before: weakref.WeakKeyDictionary[nn.Module, Implementations] = weakref.WeakKeyDictionary()


def accelerate(
    model: Model,
    *,
    dense: str | bool = "auto",
    backend: str = "auto",
    batch_invariant: bool = False,
) -> Model:
    """Run the experts of a transformers model on our kernels; returns ``model``.

    Weights stay where they are, in their own layout, so ``save_pretrained`` is unaffected. A model
    without experts is left as it is, except for ``dense``. A deep copy runs the kernels too. A
    pickle holds the model alone: ``accelerate`` the loaded one, or at least ``register`` first.

    Args:
        model: a transformers model.
        dense: also run linear layers, RMS norms and softmax routers on our CPU kernels, whose rows
            do not depend on each other: True, False, or "auto" for where those kernels can run.
        backend: back-end of the experts; see ``moesd_kernels.fused_experts``.
        batch_invariant: make experts rows independent of the rest of the batch on every device. On
            a GPU linear layers, routers and the head are, too, where a decoder walks the layers by
            itself (``DeviceStack``); the model's own forward leaves them to cuBLAS.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``dense`` is not "auto", True or False, or there is no such ``backend``.
        RuntimeError: ``dense`` is True and the CPU kernels cannot run; the message says why.
        NotImplementedError: the experts are quantised.
    """
    require_model(model)
    if dense not in ("auto", True, False):
        raise ValueError(f"dense must be 'auto', True or False, got {dense!r}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    register()
    # Modules are asked on the CPU, whatever device the caller has made the default.
    with left_as_found(model), torch.device("cpu"):
        settings = Settings(backend, batch_invariant)
        choose(model, settings)  # for whoever runs all of it
        fused = _switch_experts(model, settings)
        count = 0 if dense is False else accelerate_dense(model, required=dense is True)
    if model not in _said:
        _said.add(model)
        _say(model, fused, count)
    return model


def decelerate(model: Model) -> Model:
    """Undo ``accelerate``: the experts as they were, and the modules' own forwards.

    Raises:
        TypeError: ``model`` is no module.
    """
    require_model(model)
    for config, name in _before.pop(model, ()):
        if config._experts_implementation_internal == "moesd":
            config._experts_implementation_internal = name
    if getattr(getattr(model, "config", None), "_experts_implementation", None) == "moesd":
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    for module in model.modules():
        module.__dict__.pop(SETTINGS, None)
    unshadow(model)
    return model


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """A block that takes back what it did to the model's experts and forwards if it raises."""
    names = ("forward", SETTINGS)
    found = [(m.__dict__, name, m.__dict__.get(name)) for m in model.modules() for name in names]
    implementations = _implementations(model)
    try:
        yield
    except BaseException:
        for attributes, name, value in found:
            if value is None:
                attributes.pop(name, None)
            else:
                attributes[name] = value
        for config, implementation in implementations:
            config._experts_implementation_internal = implementation
        raise


def _implementations(model: nn.Module) -> Implementations:
    """What each config of the model's modules says of the experts."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    name = "_experts_implementation_internal"
    return [(c, getattr(c, name)) for c in configs.values() if hasattr(c, name)]


def _switch_experts(model: Any, settings: Settings) -> list[nn.Module]:
    """Switch all experts behind transformers' interface; returns those that we compute."""
    experts = [m for m in model.modules() if _is_marked(m)]
    for module in experts:
        refusal, _, _, stored = spec_of(module)
        if stored.refusal is not None or (not stored.plain and refusal is not None):
            raise NotImplementedError(f"moesd cannot run {type(module).__name__}: {refusal}")
        for weight in module.parameters(recurse=False):
            if stored.plain and weight.dtype not in _PLAIN:
                raise NotImplementedError(
                    "moesd has kernels for bfloat16, float16 and float32 experts and for those in "
                    f"{', '.join(WEIGHT_FORMATS)}, got {type(module).__name__} with weights in "
                    f"{weight.dtype}"
                )
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        return []
    before = _implementations(model)
    model.set_experts_implementation("moesd")
    _before.setdefault(model, before)
    for module in experts:
        choose(module, settings)
    return [m for m in experts if spec_of(m).refusal is None and _is_switched(m)]


def _is_marked(module: nn.Module) -> bool:
    """Whether transformers dispatches the module's forward by the name in its config."""
    return hasattr(module, "_apply_gate") or hasattr(module, "is_concatenated")


def _is_switched(experts: Any) -> bool:
    return getattr(experts.config, "_experts_implementation", None) == "moesd"


def _say(model: nn.Module, fused: list[nn.Module], dense: int) -> None:
    """What was taken over: a warning if there are experts and none of them was."""
    experts = [m for m in model.modules() if _is_marked(m) or _looks_like_experts(m)]
    total, taken = len(experts), f"{dense} dense modules on the CPU kernels"
    if not experts:
        logger.info("moesd: no experts, %s", taken)
    elif fused:
        logger.info("moesd: %d of %d expert layers fused, %s", len(fused), total, taken)
    else:
        first = experts[0]
        reason = spec_of(first).refusal if _is_marked(first) else None
        reason = reason or f"{type(first).__name__} has no experts interface"
        logger.warning("moesd: none of %d expert layers fused (%s), %s", total, reason, taken)


def _looks_like_experts(module: nn.Module) -> bool:
    return "experts" in type(module).__name__.lower()
