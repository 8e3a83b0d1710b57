"""What an EAGLE head is: its configuration, its tensors in canonical form, and what must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from decoder.checkpoint.counts import is_positive
from decoder.checkpoint.weights import few
from decoder.errors import UserError

Kind = Literal["eagle1", "eagle3"]
Shape = tuple[int | None, ...]  # None: any size


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
        mask_token: what P-EAGLE reads where nothing is drafted yet; ``None``: drafts one by one.
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
    mask_token: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "num_layers"):
            value = getattr(self, name)
            if not is_positive(value):
                raise UserError(f"EAGLE config: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"EAGLE config: num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if not isinstance(self.rms_norm_eps, int | float) or not 0 < self.rms_norm_eps < 1:
            got = self.rms_norm_eps
            raise UserError(f"EAGLE config: rms_norm_eps must be a small number, got {got!r}")
        if self.feature_layers is None:
            return
        if not self.feature_layers:
            raise UserError("EAGLE config: the list of feature layers is empty")
        if not all(isinstance(layer, int) for layer in self.feature_layers):
            raise UserError(
                f"EAGLE config: feature layers must be integers, got {self.feature_layers!r}"
            )


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


def check_head(checkpoint: EagleCheckpoint, vocab_size: int, path: Path) -> None:
    """Every tensor that is needed is there, no other, and all fit the configuration.

    Args:
        checkpoint: the head.
        vocab_size: the target's, as the head's configuration says; 0 where it does not.
        path: for messages.

    Raises:
        UserError: which tensor, the shape or type expected and the one that came.
    """
    config, weights = checkpoint.config, checkpoint.weights
    needed, optional = _expected(config, weights)
    for name in needed:
        if name not in weights:
            raise UserError(f"EAGLE head in {path} lacks tensor {name}")
    known = needed | optional
    if unknown := weights.keys() - known.keys():
        raise UserError(f"EAGLE head in {path} has tensors of no known head: {few(unknown)}")
    for name, weight in weights.items():
        got, wanted = tuple(weight.shape), known[name]
        if len(got) != len(wanted) or any(
            w not in (None, g) for g, w in zip(got, wanted, strict=True)
        ):
            text = ", ".join("any" if size is None else str(size) for size in wanted)
            raise UserError(
                f"EAGLE head in {path}: {name} must be ({text}) by its config, got {got}"
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UserError(
                f"EAGLE head in {path}: {name} must be fp64, fp32, fp16 or bf16, got {weight.dtype}"
            )
    _check_vocabulary(checkpoint, vocab_size, path)


def _expected(
    config: EagleConfig, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes of the tensors that a head must have, and of those that it may have."""
    H = config.hidden_size
    fc = weights.get("fc.weight")
    features = None if fc is None or fc.ndim != 2 else fc.shape[1]
    norms = [name for name in weights if name.startswith("fc_norm.")]
    chunk = None if features is None or not norms else features // len(norms)
    needed: dict[str, Shape] = {}
    optional: dict[str, Shape] = {
        "fc.weight": (H, 2 * H if config.kind == "eagle1" else None),
        "fc.bias": (H,),
        "norm.weight": (H,),
        "pre_lm_head_layernorm.weight": (H,),
        "embedding_layernorm.weight": (H,),
        "input_norm.weight": (features,),
        "embed_tokens.weight": (None, H),
        "lm_head.weight": (None, H),
        "lm_head.bias": (None,),
        **{f"fc_norm.{index}.weight": (chunk,) for index in range(16)},
    }
    if config.kind == "eagle3":
        needed["norm.weight"] = (H,)
    if config.mask_token is not None:
        needed["mask_hidden"] = (1, 1, features or H)
    for index in range(config.num_layers):
        for name, shape, must in _layer(config, weights, f"layers.{index}."):
            (needed if must else optional)[name] = shape
    return needed, optional


def _layer(
    config: EagleConfig, weights: Mapping[str, Tensor], prefix: str
) -> Iterator[tuple[str, Shape, bool]]:
    """Name, shape and whether it must be there, of each tensor of a layer."""
    H, D = config.hidden_size, config.head_dim
    fused = f"{prefix}hidden_norm.weight" in weights  # attends over [embedding, hidden]
    gate = weights.get(f"{prefix}mlp.gate_proj.weight")
    inner = None if gate is None or gate.ndim != 2 else gate.shape[0]
    width = 2 * H if fused else H
    kv_width = config.num_kv_heads * D
    for name, rows, columns in (
        ("self_attn.q_proj", config.num_heads * D, width),
        ("self_attn.k_proj", kv_width, width),
        ("self_attn.v_proj", kv_width, width),
        ("self_attn.o_proj", H, config.num_heads * D),
        ("mlp.gate_proj", inner, H),
        ("mlp.up_proj", inner, H),
        ("mlp.down_proj", H, inner),
    ):
        yield f"{prefix}{name}.weight", (rows, columns), True
        yield f"{prefix}{name}.bias", (rows,), False
    for name in ("self_attn.q_norm", "self_attn.k_norm"):
        yield f"{prefix}{name}.weight", (D,), False
    yield f"{prefix}post_attention_layernorm.weight", (H,), True
    yield f"{prefix}input_layernorm.weight", (H,), fused
    yield f"{prefix}hidden_norm.weight", (H,), False


def _check_vocabulary(checkpoint: EagleCheckpoint, vocab_size: int, path: Path) -> None:
    mapped, head = checkpoint.draft_to_target, checkpoint.weights.get("lm_head.weight")
    if mapped is None:
        if head is not None and head.shape[0] < vocab_size:
            raise UserError(
                f"EAGLE head in {path}: lm_head covers {head.shape[0]} tokens but there is no d2t "
                "that says which"
            )
        return
    if head is not None and head.shape[0] != mapped.numel():
        raise UserError(
            f"EAGLE head in {path}: lm_head and d2t must agree on the draft vocabulary, "
            f"got {head.shape[0]} and {mapped.numel()}"
        )
    if int(mapped.min()) < 0:
        raise UserError(f"EAGLE head in {path}: d2t leads to token {int(mapped.min())}")
    if mapped.unique().numel() != mapped.numel():
        raise UserError(f"EAGLE head in {path}: d2t gives two draft tokens one target token")
