"""Read EAGLE-1 and EAGLE-3 heads in either published layout into one shape.

Layouts, told apart by tensor names and configuration:

* SafeAILab EAGLE-1 / EAGLE-2: ``fc`` over ``[embedding, feature]``, ``layers.i.*`` whose first
  layer has no ``input_layernorm``; embedding and output projection are the target's.
* SafeAILab EAGLE-3: ``fc`` over three target features, ``midlayer.*``, own ``norm`` and ``lm_head``
  over a draft vocabulary, ``d2t`` offsets (target id = draft id + offset) and ``t2d`` mask.
* ``speculators``: ``speculators_model_type`` ``eagle`` (``fusion_fc``, ``transformer.*``, optional
  extra norms) or ``eagle3`` (``layers.0.*`` instead of ``midlayer.*``).

Everything that a checkpoint may or may not have (a norm, a bias, its own embedding) is read off its
tensors; the configuration supplies only what tensors cannot tell. It does not download anything.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from decoder.errors import UserError

Kind = Literal["eagle1", "eagle3"]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_RENAMES = (("midlayer.", "layers.0."), ("fusion_fc.", "fc."), ("transformer.", "layers.0."))
_UNUSED = ("t2d", "verifier_lm_head.", "verifier_norm.")


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """What the head's tensors cannot tell.

    Attributes:
        kind: ``eagle1`` feeds features through ``fc`` beside the embedding; ``eagle3`` fuses
            several target layers first and attends over ``[embedding, hidden]``.
        feature_layers: indices into transformers' ``hidden_states`` of the target; ``None`` leaves
            EAGLE-3's default of the inputs of layers 2, n // 2 and n - 3 to the drafter.
        norm_before_residual: EAGLE-3's first layer takes the normed hidden state as its residual.
        norm_output: the hidden state handed to the next draft step is the one after ``norm``.
        windows: per layer, how many latest positions it sees; 0 is all.
        rope: configuration keys that transformers' rotary embedding reads.
    """

    kind: Kind
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    rms_norm_eps: float
    hidden_act: str
    windows: tuple[int, ...]
    rope: dict[str, Any]
    feature_layers: tuple[int, ...] | None
    norm_before_residual: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"EAGLE config: num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.feature_layers is not None and not self.feature_layers:
            raise UserError("EAGLE config: the list of feature layers is empty")


@dataclass(frozen=True, slots=True)
class EagleCheckpoint:
    """A head in canonical form: ``layers.i.*`` names, ``draft_to_target`` as absolute ids.

    Attributes:
        config: see ``EagleConfig``.
        weights: canonical name to tensor, floating point only.
        draft_to_target: ``[draft_vocab]`` int64 target id of each draft id, ``None`` when the head
            speaks the target's vocabulary.
    """

    config: EagleConfig
    weights: dict[str, Tensor]
    draft_to_target: Tensor | None


def is_eagle_checkpoint(path: str | Path) -> bool:
    """Whether a directory holds an EAGLE head rather than a language model.

    A SafeAILab EAGLE-1 configuration is indistinguishable from a one-layer Llama's, so when the
    configuration does not say, the tensor names decide.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        return False
    raw = _read_config(path)
    if "speculators_model_type" in raw:
        return True
    if any("eagle" in str(name).lower() for name in raw.get("architectures") or ()):
        return True
    names = _tensor_names(path)
    return "fc.weight" in names or "model.fc.weight" in names


def load_eagle(path: str | Path) -> EagleCheckpoint:
    """Load a head from a directory with ``config.json`` and one weight file.

    Raises:
        UserError: a file is missing, it is not an EAGLE-1 or EAGLE-3 head, or its tensors and
            configuration disagree.
    """
    path = Path(path)
    raw = _read_config(path)
    weights = _canonical(_read_weights(path))
    layer_config = raw.get("transformer_layer_config", raw)
    kind = _kind(raw, weights, path)
    config = _parse_config(raw, layer_config, kind, weights)
    offsets = weights.pop("d2t", None)
    draft_to_target = None
    if offsets is not None:
        draft_to_target = offsets.long() + torch.arange(offsets.numel())
    checkpoint = EagleCheckpoint(config, weights, draft_to_target)
    _check(checkpoint, raw, path)
    return checkpoint


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"an EAGLE head needs {file.name}, none in {path}")
    return json.loads(file.read_text())


def _weight_file(path: Path) -> Path:
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise UserError(f"an EAGLE head needs one of {', '.join(WEIGHT_FILES)}, none in {path}")


def _tensor_names(path: Path) -> set[str]:
    if (path / "model.safetensors").is_file():
        from safetensors import safe_open

        with safe_open(path / "model.safetensors", framework="pt") as file:
            return set(file.keys())
    if (path / "pytorch_model.bin").is_file():
        return set(_load_bin(path / "pytorch_model.bin"))
    return set()


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the pre-zip format that some old heads come in cannot be mapped
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than tensors and is not loaded: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    file = _weight_file(path)
    if file.suffix == ".bin":
        return _load_bin(file)
    from safetensors.torch import load_file

    return load_file(file)


def _canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    canonical = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("model.")
        if name.startswith(_UNUSED) or name.endswith("rotary_emb.inv_freq"):
            continue
        for old, new in _RENAMES:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        canonical[name] = tensor
    return canonical


def _kind(raw: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Kind:
    declared = raw.get("speculators_model_type")
    if declared not in (None, "eagle", "eagle3"):
        raise UserError(
            f"speculators_model_type must be 'eagle' or 'eagle3', got {declared!r} in {path}"
        )
    if "fc.weight" not in weights:
        raise UserError(f"{path} holds no EAGLE head: no tensor named fc.weight")
    return "eagle3" if "layers.0.hidden_norm.weight" in weights else "eagle1"


def _parse_config(
    raw: dict[str, Any], layer: dict[str, Any], kind: Kind, weights: dict[str, Tensor]
) -> EagleConfig:
    missing = [key for key in ("hidden_size", "num_attention_heads") if key not in layer]
    if missing:
        raise UserError(f"EAGLE config lacks {', '.join(missing)}")
    heads = layer["num_attention_heads"]
    layers = {int(name.split(".")[1]) for name in weights if name.startswith("layers.")}
    rope_keys = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
    return EagleConfig(
        kind=kind,
        hidden_size=layer["hidden_size"],
        num_heads=heads,
        num_kv_heads=layer.get("num_key_value_heads") or heads,
        head_dim=layer.get("head_dim") or layer["hidden_size"] // heads,
        num_layers=len(layers),
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        hidden_act=layer.get("hidden_act", "silu"),
        windows=_windows(layer, len(layers)),
        rope={key: layer[key] for key in rope_keys if layer.get(key) is not None},
        feature_layers=(-1,) if kind == "eagle1" else _feature_layers(raw),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
        norm_output=bool(raw.get("norm_output", False)),
    )


def _windows(layer: dict[str, Any], count: int) -> tuple[int, ...]:
    types = layer.get("layer_types") or ["full_attention"] * count
    window = layer.get("sliding_window") or 0
    return tuple(window if kind == "sliding_attention" else 0 for kind in types[:count])


def _feature_layers(raw: dict[str, Any]) -> tuple[int, ...] | None:
    """Two conventions exist: a top-level list counts layer inputs, a nested one layer outputs."""
    key = "eagle_aux_hidden_state_layer_ids"
    if raw.get(key):
        return tuple(raw[key])
    nested = (raw.get("eagle_config") or {}).get(key)
    return tuple(index + 1 for index in nested) if nested else None


def _check(checkpoint: EagleCheckpoint, raw: dict[str, Any], path: Path) -> None:
    config, weights = checkpoint.config, checkpoint.weights
    inputs = 2 if config.kind == "eagle3" else 1
    H, D = config.hidden_size, config.head_dim
    expected = {
        "layers.0.self_attn.q_proj.weight": (config.num_heads * D, inputs * H),
        "layers.0.self_attn.k_proj.weight": (config.num_kv_heads * D, inputs * H),
        "layers.0.self_attn.v_proj.weight": (config.num_kv_heads * D, inputs * H),
        "layers.0.self_attn.o_proj.weight": (H, config.num_heads * D),
        "layers.0.post_attention_layernorm.weight": (H,),
    }
    if config.kind == "eagle3":
        expected["norm.weight"] = (H,)
        expected["layers.0.input_layernorm.weight"] = (H,)
    for name, shape in expected.items():
        if name not in weights:
            raise UserError(f"EAGLE head in {path} lacks tensor {name}")
        if tuple(weights[name].shape) != shape:
            raise UserError(
                f"EAGLE head in {path}: {name} must be {shape} by its config, "
                f"got {tuple(weights[name].shape)}"
            )
    if weights["fc.weight"].shape[0] != H:
        raise UserError(
            f"EAGLE head in {path}: fc must produce hidden_size {H}, "
            f"got {weights['fc.weight'].shape[0]}"
        )
    mapped, head = checkpoint.draft_to_target, weights.get("lm_head.weight")
    if head is None and mapped is not None:
        raise UserError(f"EAGLE head in {path} has d2t but no lm_head of its own")
    if head is not None and mapped is not None and head.shape[0] != mapped.numel():
        raise UserError(
            f"EAGLE head in {path}: lm_head and d2t must agree on the draft vocabulary, "
            f"got {head.shape[0]} and {mapped.numel()}"
        )
    if head is not None and mapped is None and _draft_vocab_is_smaller(raw, head):
        raise UserError(
            f"EAGLE head in {path}: lm_head covers {head.shape[0]} tokens but there is no d2t "
            "that says which"
        )


def _draft_vocab_is_smaller(raw: dict[str, Any], head: Tensor) -> bool:
    layer = raw.get("transformer_layer_config", raw)
    return "vocab_size" in layer and head.shape[0] < layer["vocab_size"]
