"""Read EAGLE-1 and EAGLE-3 heads in either published layout into one shape.

Layouts, told apart by tensor names and configuration:

* SafeAILab EAGLE-1 / EAGLE-2: ``fc`` over ``[embedding, feature]``, ``layers.i.*`` whose first
  layer has no ``input_layernorm``; embedding and output projection are the target's.
* SafeAILab EAGLE-3: ``fc`` over three target features, ``midlayer.*``, own ``norm`` and ``lm_head``
  over a draft vocabulary, ``d2t`` offsets (target id = draft id + offset) and ``t2d`` mask. Some
  publishers' ``d2t`` are target ids themselves; some heads have no ``fc`` and read one feature.
* ``speculators``: ``speculators_model_type`` ``eagle`` (``fusion_fc``, ``transformer.*``, optional
  extra norms), ``eagle3`` (``layers.0.*`` instead of ``midlayer.*``) or ``peagle``, which has a
  ``mask_hidden`` and a mask token besides.

Everything that a checkpoint may or may not have (a norm, a bias, its own embedding) is read off its
tensors; the configuration supplies only what tensors cannot tell. It does not download anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoder.checkpoint.folder import CONFIG, model_folder, read_json
from decoder.checkpoint.weights import tensor_headers, weight_files
from decoder.errors import UserError, explained

from .eagle_config import EagleCheckpoint, EagleConfig, Kind, check_head

_RENAMES = (("midlayer.", "layers.0."), ("fusion_fc.", "fc."), ("transformer.", "layers.0."))
_UNUSED = ("verifier_lm_head.", "verifier_norm.")
_KINDS: dict[str, Kind] = {"eagle": "eagle1", "eagle3": "eagle3", "peagle": "eagle3"}
_MASK_TOKENS = ("mask_token_id", "pard_token", "ptd_token_id")


def is_eagle_checkpoint(path: str | Path) -> bool:
    """Whether a directory holds an EAGLE head rather than a language model.

    A SafeAILab EAGLE-1 configuration is indistinguishable from a one-layer Llama's, so when the
    configuration does not say, the tensor names decide.

    Raises:
        UserError: the configuration or the weights cannot be read.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        return False
    raw = read_json(path / CONFIG)
    if "speculators_model_type" in raw:
        return True
    with explained(f"{path / CONFIG} cannot be used"):
        if any("eagle" in str(name).lower() for name in raw.get("architectures") or ()):
            return True
    names = {_canonical_name(name) for name in tensor_headers(weight_files(path))}
    return not names.isdisjoint({"fc.weight", "layers.0.hidden_norm.weight"})


def load_eagle(path: str | Path) -> EagleCheckpoint:
    """Load a head from a directory with ``config.json`` and safetensors weights.

    Raises:
        UserError: a file is missing or broken, it is not an EAGLE-1 or EAGLE-3 head, or its tensors
            and configuration disagree.
    """
    from safetensors.torch import load_file

    path = model_folder(path, "EAGLE head")
    with explained(f"cannot load the EAGLE head in {path}"):
        raw = read_json(path / CONFIG)
        files = weight_files(path)
        tensor_headers(files)  # says which file is broken, and how
        weights = _canonical({n: t for file in files for n, t in load_file(file).items()})
        layer_config = raw.get("transformer_layer_config", raw)
        if not isinstance(layer_config, dict):
            got = type(layer_config).__name__
            raise UserError(f"EAGLE config: transformer_layer_config must be an object, got {got}")
        kind = _kind(raw, weights, path)
        config = _parse_config(raw, layer_config, kind, weights)
        vocab_size = layer_config.get("vocab_size") or 0
        maps = weights.pop("d2t", None), weights.pop("t2d", None)
        targets = _targets(*maps, vocab_size, f"EAGLE head in {path}")
        checkpoint = EagleCheckpoint(config, weights, targets)
        check_head(checkpoint, vocab_size, path)
    return checkpoint


def _targets(d2t: Tensor | None, t2d: Tensor | None, vocab_size: int, where: str) -> Tensor | None:
    """Target id of each draft id; ``d2t`` holds offsets unless only ids can be meant."""
    if d2t is None:
        return None
    if d2t.ndim != 1 or d2t.is_floating_point() or d2t.numel() == 0:
        raise UserError(
            f"{where}: d2t must be a list of integers, got {tuple(d2t.shape)} {d2t.dtype}"
        )
    ids = d2t.long()
    readings = [ids + torch.arange(ids.numel()), ids]
    if t2d is not None:
        kept = t2d.flatten().nonzero().flatten()
        fitting = [ids for ids in readings if torch.equal(ids.sort().values, kept)]
        if not fitting:
            raise UserError(
                f"{where}: d2t must lead to the {kept.numel()} tokens that t2d marks, got other "
                f"{ids.numel()}"
            )
        return fitting[0]
    end = vocab_size or max(int(ids.max()) for ids in readings) + 1
    possible = [
        ids
        for ids in readings
        if int(ids.min()) >= 0 and int(ids.max()) < end and ids.unique().numel() == ids.numel()
    ]
    return (possible or readings)[0]


def _canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {_canonical_name(name): tensor for name, tensor in tensors.items()}
    return {
        name: tensor
        for name, tensor in named.items()
        if not name.startswith(_UNUSED) and not name.endswith("rotary_emb.inv_freq")
    }


def _canonical_name(name: str) -> str:
    name = name.removeprefix("model.")
    for old, new in _RENAMES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def _kind(raw: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Kind:
    declared = raw.get("speculators_model_type")
    if declared is not None and declared not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise UserError(
            f"speculators_model_type must be one of {known}, got {declared!r} in {path}"
        )
    fused = "layers.0.hidden_norm.weight" in weights
    if "fc.weight" not in weights and not (fused and _reads_last(raw)):
        raise UserError(f"{path} holds no EAGLE head: no tensor named fc.weight")
    kind: Kind = "eagle3" if fused else "eagle1"
    if declared is not None and _KINDS[declared] != kind:
        raise UserError(f"{path} says that it holds {declared}, its tensors are those of {kind}")
    return kind


def _parse_config(
    raw: dict[str, Any], layer: dict[str, Any], kind: Kind, weights: dict[str, Tensor]
) -> EagleConfig:
    from transformers.activations import ACT2FN

    missing = [key for key in ("hidden_size", "num_attention_heads") if key not in layer]
    if missing:
        raise UserError(f"EAGLE config lacks {', '.join(missing)}")
    heads, width = layer["num_attention_heads"], layer["hidden_size"]
    kv_heads, head_dim = layer.get("num_key_value_heads"), layer.get("head_dim")
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    hidden_act = layer.get("hidden_act", "silu")
    if hidden_act not in ACT2FN:
        raise UserError(f"EAGLE config: hidden_act is unknown, got {hidden_act!r}")
    rope_keys = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
    return EagleConfig(
        kind=kind,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        num_layers=len(layers),
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        hidden_act=hidden_act,
        windows=_windows(layer, len(layers)),
        rope={key: layer[key] for key in rope_keys if layer.get(key) is not None},
        feature_layers=(-1,) if kind == "eagle1" or _reads_last(raw) else _feature_layers(raw),
        mask_token=_mask_token(raw, weights),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
        norm_output=bool(raw.get("norm_output", False)),
    )


def _windows(layer: dict[str, Any], count: int) -> tuple[int, ...]:
    types = layer.get("layer_types") or ["full_attention"] * count
    window = layer.get("sliding_window") or 0
    if not isinstance(window, int) or window < 0 or len(types) < count:
        raise UserError(
            f"EAGLE config: sliding_window and layer_types must be of {count} layers, got "
            f"{window!r} and {types!r}"
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types[:count])


def _reads_last(raw: dict[str, Any]) -> bool:
    """Whether the target's last hidden state is its only feature."""
    return (raw.get("eagle_config") or {}).get("use_aux_hidden_state") is False


def _mask_token(raw: dict[str, Any], weights: dict[str, Tensor]) -> int | None:
    """Of a head that drafts in one pass, else ``None``."""
    parallel = bool(raw.get("parallel_drafting")) or raw.get("speculators_model_type") == "peagle"
    if not parallel and "mask_hidden" not in weights:
        return None
    found = [raw[key] for key in _MASK_TOKENS if raw.get(key) is not None]
    if not found or not isinstance(found[0], int) or found[0] < 0:
        names = " or ".join(_MASK_TOKENS)
        raise UserError(
            f"EAGLE config: a head that drafts in one pass needs {names}, got {found or None}"
        )
    return int(found[0])


def _feature_layers(raw: dict[str, Any]) -> tuple[int, ...] | None:
    """Two conventions exist: a top-level list counts layer inputs, a nested one layer outputs."""
    key = "eagle_aux_hidden_state_layer_ids"
    if raw.get(key):
        return tuple(raw[key])
    nested = (raw.get("eagle_config") or {}).get(key)
    return tuple(index + 1 for index in nested) if nested else None
