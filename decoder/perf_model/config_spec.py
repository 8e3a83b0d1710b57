"""Reads a ``ModelSpec`` from a transformers config, or from the dict of a ``config.json``.

No weights are read, so models far too large for the machine can be planned for. Matrices are
counted; norm and gate vectors only where they are more than rounding: totals agree with the real
models to about 0.1 %. What one layer holds is in ``layers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decoder.checkpoint.counts import MOST_OBJECTS, require_countable
from decoder.errors import explained
from decoder.perf_model.layers import zamba2
from decoder.perf_model.layers.attention import attention
from decoder.perf_model.layers.feed_forward import FeedForward, feed_forward
from decoder.perf_model.layers.fields import Fields, need, per_layer
from decoder.perf_model.layers.mixer import Mixer
from decoder.perf_model.layers.recurrent import FAMILIES, recurrent_mixer

from .model_spec import WEIGHT_BYTES, LayerSpec, ModelSpec

_RECURRENT = {"linear_attention", "mamba", "conv", "hybrid"}  # hybrid: beside attention
_ALONE = {"mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # mixers without a feed-forward block
# Two blocks in a layer, experts in attention or of one row, embeddings of each layer, stacks that
# run repeatedly, recurrent layers that not every release of transformers names.
_NOT_COUNTED = {
    "longcat_flash", "jetmoe", "deepseek_v4", "gemma4_text", "gemma4_unified_text", "hrm_text",
    "hy_v4", "moshi", "doge", "bert-generation", "recurrent_gemma",
}  # fmt: skip
MXFP4_BYTES = WEIGHT_BYTES["mxfp4"]
# Of bitsandbytes, absolute maxima in fp32 for 64 weights; of modelopt, scales of each algorithm.
_BNB_INT4, _BNB_INT8 = 1 / 2 + 4 / 64, 1.0
_MODELOPT = {
    "FP8": 1.0,
    "NVFP4": 1 / 2 + 1 / 16,
    "W4A16_AWQ": 1 / 2 + 2 / 128,
    "W4A8_AWQ": 1 / 2 + 2 / 128,
    "W8A8_SQ_PER_CHANNEL": 1.0,
}


def spec_from_config(config: Any, name: str | None = None) -> ModelSpec:
    """Read a transformers config object, or the dict of a ``config.json``.

    Raises:
        NotImplementedError: a kind of layer, or of quantised weights, that is not known here.
        ValueError: a field the count needs is missing or no positive integer.
    """
    fields = _fields(config)
    kind = fields.get("model_type", "")
    if kind in _NOT_COUNTED or fields.get("type_vocab_size"):  # which BERT's kin have
        raise NotImplementedError(f"layers of {kind!r} are not known here")
    num_layers = need(fields, "num_hidden_layers", "n_layer")
    types: Sequence[str | None] = per_layer(fields, "layer_types", num_layers) or ()
    types = types or [None] * num_layers
    hidden = need(fields, "hidden_size", "n_embd")
    vocab = need(fields, "vocab_size")
    embed_width = fields.get("word_embed_proj_dim") or hidden
    embedding = vocab * embed_width
    if kind in ("opt", "gpt2"):
        embedding += (fields.get("max_position_embeddings") or 0) * hidden
    if embed_width != hidden:
        embedding += 2 * embed_width * hidden
    spec = ModelSpec(
        name=name or _own_name(fields) or kind or "model",
        hidden=hidden,
        vocab=vocab,
        layers=tuple(_layer(fields, kind, index, name) for index, name in enumerate(types)),
        embedding=embedding,
        head=vocab * embed_width,
        repeated=zamba2.repeated(fields, types.count("hybrid")) if kind == "zamba2" else 0,
        tied=bool(fields.get("tie_word_embeddings", kind in ("opt", "gpt2"))),
    )
    return _as_stored(spec, fields)


def _own_name(fields: Fields) -> str:
    """What the model calls itself: a repository's id, or the name of the folder it was read from.

    Profiles and measured lines go to other machines, where a whole path means nothing.
    """
    named = fields.get("_name_or_path") or ""
    return Path(named).name if Path(named).is_absolute() else named


def _fields(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        require_countable(config, "config", MOST_OBJECTS)
        kind = config.get("model_type")
        if not kind:
            return config
        from transformers import CONFIG_MAPPING

        with explained(f"config describes no {kind!r}"):
            if kind not in CONFIG_MAPPING:
                return _unknown(kind, config)
            # fills the defaults that a config.json leaves out
            rest = {key: _with_floats(x) for key, x in config.items() if key != "model_type"}
            config = CONFIG_MAPPING[kind](**rest)
    stored = getattr(config, "quantization_config", None)  # of the whole, where that has parts
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if not hasattr(config, "to_dict"):
        raise ValueError(f"config must be a transformers config or a dict, got {type(config)}")
    fields: dict[str, Any] = config.to_dict()
    if isinstance(stored, Mapping):
        fields["quantization_config"] = stored
    for old, new in getattr(config, "attribute_map", {}).items():
        fields.setdefault(old, fields.get(new))
    for name in ("model_type", "layer_types", "num_hidden_layers"):  # properties of some
        fields[name] = getattr(config, name, fields.get(name))
    return fields


def _with_floats(value: Any) -> Any:
    """transformers saves what JSON has no number for as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _unknown(kind: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields as they are; without transformers' reading of them, no recurrent layer shows."""
    if kind in FAMILIES:
        raise NotImplementedError("this version of transformers does not know it")
    return config.get("text_config") or config


def _as_stored(spec: ModelSpec, fields: Mapping[str, Any]) -> ModelSpec:
    """With the bytes that the config says of a parameter; bf16 where it says nothing."""
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
    plain = 4.0 if "float32" in dtype else 2.0
    said = fields.get("quantization_config") or {}
    method = str(said.get("quant_method", ""))
    linear = expert = plain
    head = None  # stays plain
    if method == "mxfp4":  # gpt-oss: the experts only
        expert = MXFP4_BYTES
    elif "fp8" in method:
        linear = expert = WEIGHT_BYTES["fp8"]
    elif method == "moesd":  # of moesd_kernels.quantize
        for step in said.get("steps", ()):
            expert = _integer_bytes(step)
            linear = expert if step.get("linears") else linear
        head = linear
    elif said:
        linear = expert = _published_bytes(method, said)
    if linear == expert == plain:
        return spec.with_weight_bytes(plain, plain=plain)
    rest = sum(layer.attention + layer.dense for layer in spec.layers)
    heads = spec.head * (plain if head is None else head)
    dense = (heads + rest * linear) / (spec.head + rest)
    return spec.with_weight_bytes(dense, expert, None if spec.tied else plain, plain)


def _published_bytes(method: str, said: Mapping[str, Any]) -> float:
    """Bytes of a weight in a format that others quantise to.

    Raises:
        NotImplementedError: it is not said in a way that is known here.
    """
    if bits := said.get("bits"):  # GPTQ, AWQ and their kin
        return _grouped_bytes(bits, said.get("group_size"))
    if method == "bitsandbytes" and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        return _BNB_INT4 if said.get("load_in_4bit") else _BNB_INT8
    if said.get("quant_algo") in _MODELOPT:
        return _MODELOPT[said["quant_algo"]]
    weights = [group.get("weights") or {} for group in (said.get("config_groups") or {}).values()]
    sizes = {_compressed_bytes(x) for x in weights if x.get("num_bits")}
    if len(sizes) == 1:
        return sizes.pop()
    what = f"{method!r} with {said['quant_algo']!r}" if said.get("quant_algo") else repr(method)
    raise NotImplementedError(f"the bytes of a weight of quant_method {what} are not known here")


def _compressed_bytes(weights: Mapping[str, Any]) -> float:
    """Of a group of compressed-tensors; four-bit floats (NVFP4, MXFP4) have scales of a byte."""
    bits = weights["num_bits"]
    scale = 1 if (weights.get("type"), bits) == ("float", 4) else 2
    return _grouped_bytes(bits, weights.get("group_size"), scale)


def _grouped_bytes(bits: int, group: int | None, scale: int = 2) -> float:
    """With a scale of so many bytes for each group; those of rows (none, -1) are next to none."""
    return bits / 8 + (scale / group if group and group > 0 else 0.0)


def _integer_bytes(step: Mapping[str, Any]) -> float:
    """Bytes of a weight of int8 or int4 with a bf16 scale for a group; a row's is next to none."""
    bits, group = (4 if step.get("weight_format") == "int4" else 8), step.get("group")
    return bits / 8 + (2 / group if group else 0.0)


def _layer(fields: Fields, kind: str, index: int, layer_type: str | None) -> LayerSpec:
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    if layer_type not in (None, "sliding_attention"):
        window = None
    mixer, block = _mixer(fields, kind, layer_type), _block(fields, kind, index, layer_type)
    return LayerSpec(
        attention=mixer.params,
        query_width=mixer.query_width,
        kv_width=mixer.kv_width,
        window=window,
        dense=block.dense,
        expert=block.expert,
        num_experts=block.num_experts,
        top_k=block.top_k,
        state_width=mixer.state_width,
        conv_width=mixer.conv_width,
        ring_width=mixer.ring_width,
    )


def _mixer(fields: Fields, kind: str, layer_type: str | None) -> Mixer:
    if layer_type in ("moe", "mlp"):
        return Mixer()
    if layer_type in _RECURRENT:
        mixer = recurrent_mixer(kind, fields)
        if layer_type != "hybrid":
            return mixer
        return mixer + (
            zamba2.shared_block(fields)[0] if kind == "zamba2" else attention(kind, fields)
        )
    if layer_type is not None and "attention" not in layer_type:
        raise NotImplementedError(f"layer type {layer_type!r} of {kind!r} is not known here")
    return attention(kind, fields)


def _block(fields: Fields, kind: str, index: int, layer_type: str | None) -> FeedForward:
    if kind == "zamba2":
        dense = zamba2.shared_block(fields)[1] if layer_type == "hybrid" else 0
        return FeedForward(dense=dense)
    if kind in _ALONE and layer_type not in ("moe", "mlp"):
        return FeedForward()
    return feed_forward(kind, fields, index, layer_type)
