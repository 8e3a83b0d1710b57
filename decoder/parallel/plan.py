"""Which of transformers' plans a target is loaded by, and why it cannot be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from decoder.errors import UserError

from .mode import Mode
from .shards import EXPERTS, STYLES, style_of

_ROWS = ("colwise", "packed_colwise")  # styles that divide a weight's outputs
_COLUMNS = ("rowwise", "packed_rowwise")  # and its inputs
# What transformers may do to a rank's part of a file's tensor: it divides first, and then converts.
_DIVISIBLE = {"MergeModulelist", "Concatenate"}


def distributed_config(config: Any, mode: Mode, size: int) -> Any:
    """What ``from_pretrained`` takes to divide a model among ``size`` ranks.

    ``"expert"`` divides the experts and repeats the rest on every rank; ``"tensor"`` divides every
    matrix that the model's plan names.

    Args:
        config: the model's.
        mode: what is divided.
        size: ranks, at least 2.

    Raises:
        UserError: transformers has no such plan for this model, or it does not come out even.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{type(config).__name__} has quantised weights; expected plain ones to divide among "
            "ranks"
        )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if mode == "tensor":
        _check_tensors(model, size)
        return DistributedConfig(tp_size=size)
    _check_experts(model, size)
    if "ep_size" not in DistributedConfig.__dataclass_fields__:  # before 5.21
        return DistributedConfig(tp_size=size, enable_expert_parallel=True)
    # An empty plan for the rest is refused: one that leaves it as it is says the same.
    head = _name_of(model, model.get_output_embeddings())
    rest = dict.fromkeys([*model.tp_plan, head], "replicate")
    return DistributedConfig(tp_size=size, ep_size=size, tp_plan=rest)


def _check_experts(model: Any, size: int) -> None:
    name = type(model).__name__
    experts = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "num_experts")]
    if not experts:
        raise UserError(
            f"{name} has no experts to divide among ranks; expected a sparse model, or "
            "--parallel tensor"
        )
    if not model._ep_plan:
        raise UserError(f"transformers has no expert-parallel plan for {name}")
    for module in experts:
        if module.num_experts % size:
            raise UserError(
                f"{module.num_experts} experts of {name} cannot be divided evenly among {size} "
                "ranks"
            )


def _check_tensors(model: Any, size: int) -> None:
    name, plan = type(model).__name__, model.tp_plan
    if not model.base_model.config.base_model_tp_plan:
        raise UserError(f"transformers has no tensor-parallel plan for {name}")
    cut = _cut_in_loading(model)
    heads_divided = False
    for path, module in model.named_modules():
        style = style_of(path, plan)
        if style is not None and style not in STYLES:
            raise UserError(
                f"transformers' plan divides {path} of {name} in the style {style!r}; expected one "
                f"of {', '.join(sorted(STYLES))}"
            )
        if style == EXPERTS and getattr(module, "has_bias", False):
            raise UserError(f"{path} of {name} has biases, which parts of an expert cannot share")
        if getattr(module, "activation_sparsity", 0):  # Gemma 3n
            raise UserError(
                f"{path} of {name} sets activations to zero by the mean and deviation of all of "
                "them, of which a rank has a part"
            )
        for key, parameter in module.named_parameters(recurse=False):
            style = style_of(f"{path}.{key}", plan) or style_of(path, plan)
            if style in (*_ROWS, *_COLUMNS) and any(end in f"{path}.{key}" for end in cut):
                raise UserError(
                    f"{path}.{key} of {name} lies in files joined with others, which transformers "
                    "cannot divide among ranks"
                )
            if parameter.ndim > 1 and style in (*_ROWS, *_COLUMNS):
                width = parameter.shape[-2 if style in _ROWS else -1]
                width //= 1 + (style in ("packed_colwise", "packed_rowwise"))
                if width % size:
                    raise UserError(
                        f"{path}.{key} of {name} has {width} features, which cannot be divided "
                        f"evenly among {size} ranks"
                    )
        heads_divided |= path.endswith("k_proj") and style_of(path, plan) in _ROWS
    config = model.config.get_text_config(decoder=True)
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, what, None)
        if heads_divided and isinstance(heads, int) and heads % size:
            raise UserError(
                f"{heads} {what[4:].replace('_', ' ')} of {name} cannot be divided evenly among "
                f"{size} ranks"
            )


def _cut_in_loading(model: Any) -> set[str]:
    """Ends of names of parameters that transformers cuts out of tensors when it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return {
        target
        for entry in get_model_conversion_mapping(model)
        if {type(one).__name__ for one in getattr(entry, "operations", ())} - _DIVISIBLE
        for target in entry.target_patterns
    }


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)
