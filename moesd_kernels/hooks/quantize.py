"""``quantize``: a loaded model's matrices as integers in groups, in place of the numbers they were.

A module that is quantised computes with the numbers that its integers stand for, whether or not
``accelerate`` follows, which lets it do so on our kernels.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor, nn

from moesd_kernels.formats import (
    GROUPS,
    WEIGHT_FORMATS,
    KeepsScales,
    QuantizedLinear,
)
from moesd_kernels.formats import quantize as quantize_weight

from .experts import experts_forward, spec_of
from .packed import DOWN_FORMAT, FORMAT, INT8_ACTIVATIONS, SCALE
from .shadow import require_model

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# How a config says that its model's weights are ours.
METHOD = "moesd"
# Linear layers by these names choose or weigh experts: few bytes, and every rounding turns choices.
_ROUTERS = ("gate", "router", "shared_expert_gate")


class QuantizedExperts(KeepsScales):
    """What a class of experts gains when it is quantised: a forward that reads the integers."""

    scale_names = tuple(f"{name}{SCALE}" for name in ("gate_up_proj", "up_proj", "down_proj"))
    forward = experts_forward

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made where it is needed, so copies and pickles go by the class it is made of.
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[1],), *reduced[2:]


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _quantized_class(experts: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an experts module's class that is a ``QuantizedExperts``."""
    if experts not in _made:
        _made[experts] = type(f"Quantized{experts.__name__}", (QuantizedExperts, experts), {})
    return _made[experts]


def _blank(experts: type[nn.Module]) -> nn.Module:
    made = _quantized_class(experts)
    blank: nn.Module = made.__new__(made)
    return blank


def quantize(
    model: Model, weight_format: str, *, group: int | None = 32, linears: bool = True
) -> Model:
    """Store a transformers model's experts and linear layers as integers; returns ``model``.

    Parameters are replaced one by one, so memory falls as it goes. ``state_dict`` then has one
    integer tensor and one scale (``…weight`` and ``…weight_scale``, ``…down_proj`` and
    ``…down_proj_scale``), which another model of the same config loads after ``quantize``, also on
    the "meta" device with ``load_state_dict(…, assign=True)``. ``save_pretrained`` saves it, and
    ``from_pretrained`` loads that within ``keep_quantized``: the config says how. Routers, norms,
    the embedding and matrices that a model's own code looks at (Mamba's ``dt_proj`` and head) stay
    as they are; a head that shares the embedding's matrix becomes a copy in integers, and the
    config says so (``tie_word_embeddings``): it is read whole at every step, the embedding is not.
    A matrix that no group divides stays as it is, and a line says how many did.

    Args:
        model: a model with plain weights, of any dtype; no gradients remain.
        weight_format: "int8" or "int4".
        group: weights of a row that share a scale: 32, 64 or 128; where it does not divide a
            depth, the next smaller one that does. None: all of them, which for int8 loses little,
            and which a CPU with AMX multiplies about half as fast again as groups.
        linears: linear layers too, not the experts alone.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``weight_format`` or ``group`` is none of those, or no weight was quantised.
    """
    require_model(model)
    if weight_format not in ("int8", "int4"):
        raise ValueError(f"weight_format must be 'int8' or 'int4', got {weight_format!r}")
    if group not in (*GROUPS, None):
        raise ValueError(f"group must be one of {GROUPS} or None, got {group}")
    done, left = 0, []
    for name, module in list(model.named_modules()):
        if hasattr(module, "is_transposed") and hasattr(module, "down_proj"):
            taken = _quantize_experts(module, weight_format, group)
        elif linears and name and type(module) is nn.Linear and not _stays(model, name):
            taken = _quantize_linear(model, name, module, weight_format, group)
        else:
            continue
        done += taken
        left += [] if taken else [name]
    if not done:
        raise ValueError(
            f"{type(model).__name__} has no weights that can be {weight_format}: expected plain "
            f"experts or linear layers in it, with depths that {GROUPS[0]} divides, got {left[:3]}"
        )
    step = {"weight_format": weight_format, "group": group, "linears": linears}
    _record(model, step | {"of": type(model).__name__})
    if left:
        logger.warning(
            "%d modules stay as they were, with depths that %d does not divide or experts that are "
            "not fused; the first is %s",
            *(len(left), GROUPS[0], left[0]),
        )
    return model


def _stays(model: nn.Module, name: str) -> bool:
    """Whether a linear layer is a router, or one whose matrix its owner's code does not only call.

    Such code multiplies by the matrix itself, or converts hidden states to its dtype.
    """
    owner, _, leaf = name.rpartition(".")
    kind: Any = type(model.get_submodule(owner))
    return leaf in _ROUTERS or f"self.{leaf}.weight" in _source(kind)


@functools.cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in at a prompt
        return ""


def _record(model: Any, step: dict[str, Any]) -> None:
    """Let the model's config say how it was quantised, by which its files are loaded.

    A model shares its config with the parts of it, which may be what was quantised.
    """
    config = getattr(model, "config", None)
    said = dict(getattr(config, "quantization_config", None) or {"quant_method": METHOD})
    if config is not None and said.get("quant_method") == METHOD:
        config.quantization_config = said | {"steps": [*said.get("steps", ()), step]}


def quantize_experts(model: Model, weight_format: str, *, group: int | None = 32) -> Model:
    """``quantize`` of the experts alone."""
    return quantize(model, weight_format, group=group, linears=False)


def use_int8_activations(model: Model, enabled: bool = True) -> Model:
    """Let a model's quantised layers round their inputs to eight bits; returns ``model``.

    Products of integers cost less than the weights' bytes do, where those of 16-bit numbers cost
    more: on a CPU four-bit weights then take about half the time. Results change a little, by the
    rounding that ``formats.round_to_int8`` defines, and no more depend on what shares a batch than
    they did. For weights in integers (``WeightFormat.integers``) on the CPU kernels, of experts
    where both projections' are; other layers stay as they are. Say so before ``accelerate``, or a
    decoder, takes the model.

    Args:
        model: one that ``quantize`` or ``load_gguf`` made.
        enabled: False lets inputs be as they are again.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no layer has such weights.
    """
    require_model(model)
    layers: list[Any] = [m for m in model.modules() if _holds_integers(m)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with weights in integers")
    for layer in layers:
        setattr(layer, INT8_ACTIVATIONS, enabled)
    return model


def _holds_integers(module: nn.Module) -> bool:
    if isinstance(module, QuantizedLinear):
        return WEIGHT_FORMATS[module.weight_format].integers
    return isinstance(module, QuantizedExperts) and spec_of(module).spec.integers


def _group_for(depth: int, group: int | None) -> int | None:
    """Weights of a row that share a scale, or None where no group divides it."""
    fitting = [size for size in GROUPS if size <= (group or max(GROUPS)) and depth % size == 0]
    return depth if fitting and group is None else max(fitting, default=None)


def _quantize_linear(
    model: nn.Module, name: str, linear: nn.Linear, weight_format: str, group: int | None
) -> bool:
    size = _group_for(linear.in_features, group)
    if size is None or linear.weight.dtype.itemsize < 2:
        return False
    ties, key = _ties(model), f"{name}.weight"
    shared = linear.weight is getattr(_embedding(model), "weight", None)
    tied = shared or key in ties or key in ties.values()
    weight, scale = quantize_weight(linear.weight, weight_format, size)
    bias = linear.bias if linear.bias is None else linear.bias.detach()
    quantized = QuantizedLinear(weight, scale, bias, WEIGHT_FORMATS[weight_format])
    model.set_submodule(name, quantized.train(linear.training))
    if tied:
        _untie(model)
    return True


def _embedding(model: nn.Module) -> nn.Module | None:
    find: Callable[[], nn.Module | None] = getattr(model, "get_input_embeddings", lambda: None)
    with suppress(NotImplementedError):  # of models that take no tokens
        return find()
    return None


def _untie(model: Any) -> None:
    """Let the model, and what is saved of it, know that its head is a matrix of its own.

    The flag is of all ties of a model, so what else is tied becomes parameters of their own too.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    for config in (*configs, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    ties = _ties(model)
    for name in ties:
        owner, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(owner)._parameters
        if (own := parameters.get(leaf)) is not None and own.is_floating_point():
            parameters[leaf] = nn.Parameter(own.detach().clone(), own.requires_grad)
    ties.clear()


def _ties(model: nn.Module) -> dict[str, str]:
    """The names of what transformers ties, each with that of its source."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return ties


def _quantize_experts(experts: Any, weight_format: str, group: int | None) -> bool:
    """Replace both projections and the class; False where we do not run them, or no group fits."""
    computes = spec_of(experts)
    names = ("gate_up_proj" if computes.spec.gated else "up_proj", "down_proj")
    weights = [experts._parameters.get(name) for name in names]
    if computes.refusal is not None or any(w is None or w.dtype.itemsize < 2 for w in weights):
        return False
    axis = -2 if computes.spec.transposed else -1
    sizes = [_group_for(weight.shape[axis], group) for weight in weights]
    if None in sizes:
        return False
    del weights
    for name, size in zip(names, sizes, strict=True):
        weight = experts._parameters[name].detach()
        rows: Tensor = weight.mT if computes.spec.transposed else weight
        assert size is not None
        stored = quantize_weight(rows, weight_format, size)
        del weight, rows
        _replace_projection(experts, name, *stored)
    _become_quantized(experts, weight_format)
    return True


def hold_quantized(
    experts: Any,
    weight_format: str,
    stored: Mapping[str, tuple[Tensor, Tensor | None]],
    down_format: str | None = None,
) -> None:
    """Let an experts module have these weights and scales, by the names of its projections."""
    for name, (weight, scale) in stored.items():
        _replace_projection(experts, name, weight, scale)
    _become_quantized(experts, weight_format, down_format)


def _replace_projection(experts: Any, name: str, weight: Tensor, scale: Tensor | None) -> None:
    setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    beside = scale if scale is None else nn.Parameter(scale, requires_grad=False)
    experts.register_parameter(f"{name}{SCALE}", beside)


def _become_quantized(experts: Any, weight_format: str, down_format: str | None = None) -> None:
    setattr(experts, FORMAT, weight_format)
    setattr(experts, DOWN_FORMAT, down_format)
    experts.is_transposed = False
    experts.__class__ = _quantized_class(type(experts))
