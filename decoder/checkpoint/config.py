"""A model's configuration: read, and refused where its numbers cannot be true.

The numbers are compared with what the weight files hold before a model is made of them: a folder of
a few kilobytes must not make the machine count to a billion.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from decoder.errors import UserError, explained

from .counts import MOST_OBJECTS, is_positive, require_countable
from .folder import CONFIG, read_json
from .weights import TensorHeader

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_NO_LIMIT = {"max_position_embeddings": -1}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "top_k_experts",
    "moe_top_k",
    "moe_k",
)
# Any other may name a kernel on the model hub, which transformers would fetch and run.
_ATTENTION = (None, "eager", "sdpa")
_EXPERTS_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm")
# Families that only their own code knows by name: with another's layers, and heads beside them.
_ALIKE = {"mimo": "qwen2"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_SPARE_ELEMENTS = 2**24  # a model may exceed its files by this much: then its tensors are named


def read_config(folder: Path, tensors: int) -> Any:
    """transformers' configuration object of a folder's ``config.json``.

    Args:
        folder: from ``model_folder``.
        tensors: how many its weight files hold.

    Raises:
        UserError: not readable, a model that transformers does not know, or numbers that cannot be.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = folder / CONFIG
    raw = read_json(file)
    require_countable(raw, file, MOST_OBJECTS + tensors)
    for key in ("transformers_weights", "configuration_files"):  # other files in place of those
        if raw.get(key) is not None:
            raise UserError(f"{file}: {key} is not supported, got {raw[key]!r}")
    kind = _ALIKE.get(str(raw.get("model_type")), raw.get("model_type"))
    code = "; it needs Python code of its own, which is never run" if "auto_map" in raw else ""
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{file}: transformers knows no model_type {kind!r}{code}")
    _require_known_quantization(raw.get("quantization_config"), file)
    with explained(f"{file} cannot be used"):
        if kind == raw["model_type"]:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[kind].from_dict(raw)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"{file}: {kind!r} is no causal language model{code}")
        _check_numbers(config.get_text_config(decoder=True), file)
        _forget_implementations(config)
    return config


def experts_per_token(config: Any) -> list[Any]:
    """The router's K under whichever name the family uses: one for all layers, or one for each.

    Empty where the configuration, of text alone, names none.
    """
    found = _first(config, _TOP_K)
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]


def require_described(config: Any, headers: Mapping[str, TensorHeader], file: Path) -> None:
    """Refuse a configuration that describes far more weights than the files hold, or other types.

    The model is laid out without memory for that. Renaming, joining and transposing tensors, as
    transformers does, keeps their number of elements; quantized ones unpack to more, by a factor
    that is bounded by the bits of an element.

    Raises:
        UserError: with both numbers, or why the model cannot be laid out.
    """
    from transformers import AutoModelForCausalLM

    with explained(f"{file} describes no model that can be made"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        described = sum(weight.numel() for weight in model.parameters())
    held = sum(header.numel for header in headers.values())
    if getattr(config, "quantization_config", None):
        held *= 64
    else:
        _require_floats(model.state_dict(), headers, file)
    if described > held + _SPARE_ELEMENTS:
        raise UserError(f"{file} describes {described:,} weights, the files hold {held:,}")


def _require_known_quantization(fields: Any, file: Path) -> None:
    """transformers reads weights as they are where it does not know how they are quantized."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if fields is None:
        return
    method = fields.get("quant_method") if isinstance(fields, Mapping) else fields
    # bitsandbytes' two ways have one name in files, and older files say it by these keys.
    by_keys = isinstance(fields, Mapping) and ("load_in_8bit" in fields or "load_in_4bit" in fields)
    if not by_keys and method != "bitsandbytes" and method not in AUTO_QUANTIZER_MAPPING:
        raise UserError(f"{file}: transformers knows no quant_method {method!r}")


def _require_floats(
    state: Mapping[str, Any], headers: Mapping[str, TensorHeader], file: Path
) -> None:
    for name, header in headers.items():
        wanted = state[name].is_floating_point() if name in state else name.endswith(".weight")
        if wanted and header.dtype not in _FLOATS:
            raise UserError(
                f"{file} says nothing of quantized weights (quantization_config), and {name} is "
                f"{header.dtype}, expected one of {', '.join(_FLOATS)}"
            )


def _check_numbers(config: Any, file: Path) -> None:
    for name in _POSITIVE:
        value = getattr(config, name, None)
        if value is None or isinstance(value, list) or value == _NO_LIMIT.get(name):
            continue
        if not is_positive(value):
            raise UserError(f"{file}: {name} must be a positive integer, got {value!r}")
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise UserError(
            f"{file}: num_attention_heads must be a multiple of num_key_value_heads, got {heads} "
            f"and {kv_heads}"
        )
    experts = _first(config, _EXPERTS)
    if not isinstance(experts, int) or experts == 0:
        return  # a dense model, or one whose layers differ
    for top_k in experts_per_token(config):
        if not is_positive(top_k) or top_k > experts:
            raise UserError(f"{file}: experts per token must be in [1, {experts}], got {top_k!r}")


def _first(config: Any, names: tuple[str, ...]) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), None)


def _forget_implementations(config: Any) -> None:
    """How attention and experts are computed is not the folder's to say."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    known = [part for part in parts if part is not None]
    if any(part._attn_implementation not in _ATTENTION for part in known):
        config._attn_implementation = None
    if any(part._experts_implementation not in _EXPERTS_IMPLEMENTATIONS for part in known):
        config._experts_implementation = None
