"""Checkpoints that carry multi-token-prediction heads, by the published names.

A head's decoder layer comes from a second random model of the target's class, which is also what
the reference runs: transformers' layer on whole sequences, no cache and no rows.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from support.tiny import randomize, tiny_model
from torch import Tensor

_AROUND = "model.layers.{layer}"
# What each part is called, with ``{i}`` for the head and ``{layer}`` for its place after the
# target's layers. A part that is not there is the target's.
NAMES: dict[str, dict[str, str]] = {
    "deepseek": {
        "layer": _AROUND,
        "enorm": f"{_AROUND}.enorm",
        "hnorm": f"{_AROUND}.hnorm",
        "projection": f"{_AROUND}.eh_proj",
        "norm": f"{_AROUND}.shared_head.norm",
        "embedding": f"{_AROUND}.embed_tokens",
        "lm_head": f"{_AROUND}.shared_head.head",
    },
    "qwen": {
        "layer": "mtp.layers.{i}",
        "enorm": "mtp.pre_fc_norm_embedding",
        "hnorm": "mtp.pre_fc_norm_hidden",
        "projection": "mtp.fc",
        "norm": "mtp.norm",
    },
    "mimo": {
        "layer": "model.mtp_layers.{i}",
        "enorm": "model.mtp_layers.{i}.token_layernorm",
        "hnorm": "model.mtp_layers.{i}.hidden_layernorm",
        "projection": "model.mtp_layers.{i}.input_proj",
        "norm": "model.mtp_layers.{i}.final_layernorm",
    },
    "ernie": {
        "layer": "model.mtp_block.{i}",
        "enorm": "model.mtp_emb_norm.{i}",
        "hnorm": "model.mtp_hidden_norm.{i}",
        "projection": "model.mtp_linear_proj.{i}",
    },
}
# Family, names and settings of a target whose publisher has heads, and of its head's only layer.
_FULL = "full_attention"
PUBLISHED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", "deepseek", {}, {"first_k_dense_replace": 0}),
    "glm4_moe": ("glm4_moe", "deepseek", {}, {"first_k_dense_replace": 0}),
    "qwen3_next": ("qwen3_next", "qwen", {"layer_types": [_FULL] * 2}, {"layer_types": [_FULL]}),
    "mimo": ("qwen2", "mimo", {}, {"layer_types": [_FULL]}),
    "ernie4_5": ("ernie4_5_moe", "ernie", {}, {}),
}


class ReferenceHead(NamedTuple):
    """A head's parts; its layer, and the norm after it, are ``base``."""

    names: str
    base: Any
    parts: dict[str, Tensor]

    @torch.no_grad()
    def step(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """``[S]`` tokens, each that of the next position, and ``[S, H]`` to ``[S, H]``."""
        embeds = self.parts["embedding"][tokens]
        pair = [self._normed(embeds, "enorm"), self._normed(hidden, "hnorm")]
        if self.names == "mimo":
            pair.reverse()
        inputs = torch.cat(pair, -1) @ self.parts["projection"].T
        return self.base(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]

    def _normed(self, x: Tensor, name: str) -> Tensor:
        scale = self.parts[name] + (type(self.base).__name__ == "Qwen3NextModel")
        eps = self.base.config.rms_norm_eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


def target_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A target of ``PUBLISHED``."""
    family, _, settings, _ = PUBLISHED[name]
    return tiny_model(family, dtype, attn_implementation="sdpa", **settings)


def save_published(path: Path, name: str, count: int = 1) -> tuple[Any, list[ReferenceHead]]:
    """A target of ``PUBLISHED`` and ``count`` heads on disk, and both as they are."""
    _, names, _, layer = PUBLISHED[name]
    target = target_of(name)
    return target, save_with_heads(path, target, names, count, **layer)


@torch.no_grad()
def save_with_heads(
    path: Path, target: Any, names: str, count: int = 1, **layer: Any
) -> list[ReferenceHead]:
    """Save a target with ``count`` heads beside it; ``layer`` is how their layer's config differs.

    DeepSeek's heads bring an embedding and an output projection, here unlike the target's.
    """
    target.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    depth, heads = target.config.num_hidden_layers, []
    for i in range(count):
        named = {part: text.format(i=i, layer=depth + i) for part, text in NAMES[names].items()}
        base, own = _layer(path / "other", target, 100 + i, layer)
        parts = _parts(target, base, 200 + i)
        for part, full in named.items():
            if part == "layer":
                tensors |= {f"{full}.{rest}": tensor for rest, tensor in own.items()}
            else:  # one name for all heads: all have the first one's
                parts[part] = tensors.setdefault(f"{full}.weight", parts[part].clone())
        unnamed = parts.keys() - named.keys()
        parts |= {part: _of_target(target)[part] for part in unnamed}
        base.norm.weight.copy_(parts["norm"])
        heads.append(ReferenceHead(names, base, parts))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    file = path / "config.json"
    fields = json.loads(file.read_text()) | {"num_nextn_predict_layers": count}
    file.write_text(json.dumps(fields))
    return heads


def _layer(
    scratch: Path, target: Any, seed: int, changes: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """A base model of one layer, and that layer's tensors by the names of a checkpoint."""
    config = copy.deepcopy(target.config)
    for name, value in {"num_hidden_layers": 1, **changes}.items():
        setattr(config, name, value)
    model = type(target)(config)
    randomize(model, seed)
    model.to(target.dtype).eval().save_pretrained(scratch)
    tensors = load_file(scratch / "model.safetensors")
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    prefix = "model.layers.0."
    layer = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return model.base_model, layer


def _parts(target: Any, base: Any, seed: int) -> dict[str, Tensor]:
    """Random parts around a layer, large enough that forgetting one shows."""
    generator, (V, H) = torch.Generator().manual_seed(seed), _of_target(target)["embedding"].shape

    def drawn(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=generator).to(target.dtype)

    return {
        "enorm": base.norm.weight + drawn(H, scale=0.2),
        "hnorm": base.norm.weight + drawn(H, scale=0.2),
        "norm": base.norm.weight + drawn(H, scale=0.2),
        "projection": drawn(H, 2 * H, scale=(2 * H) ** -0.5),
        "embedding": drawn(V, H, scale=1.5 * H**-0.5),
        "lm_head": drawn(V, H, scale=1.5 * H**-0.5),
    }


def _of_target(target: Any) -> dict[str, Tensor]:
    return {
        "norm": target.base_model.norm.weight.detach(),
        "embedding": target.get_input_embeddings().weight.detach(),
        "lm_head": target.get_output_embeddings().weight.detach(),
    }


def reference_draft(
    heads: list[ReferenceHead], tokens: list[int], features: Tensor, gamma: int
) -> list[int]:
    """Greedy chain after ``tokens``, every drafted token from whole sequences.

    Args:
        heads: in the order of their turns; the last goes on with its own output.
        tokens: committed ones, the last without a feature.
        features: ``[len(tokens) - 1, H]``.
        gamma: how many to draft.
    """
    text, hidden, turn = list(tokens), features, 0
    for step in range(gamma):
        turn = min(step, len(heads) - 1)
        head = heads[turn]
        following = torch.tensor(text[1 + turn :])
        out = head.step(following, hidden)
        text.append(int((head.parts["lm_head"] @ out[-1]).argmax()))
        hidden = out if step + 1 < len(heads) else torch.cat([hidden, out[-1:]])
    return text[len(tokens) :]
