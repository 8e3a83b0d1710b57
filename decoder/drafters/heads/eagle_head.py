"""The EAGLE head as a compact module on the decoder's own ragged cache and attention.

``t`` is the feature's position, which is also its RoPE position and its place in the cache row.

* EAGLE-1: ``x_t = fc([embed(token_{t+1}), feature_t])``, then Llama layers of which the first has
  no input norm. The output stands for ``feature_{t+1}``; the target's ``lm_head`` reads it.
* EAGLE-3: ``h_t = fc(features_t)``; the first layer attends over ``[norm(embed(token_{t+1})),
  norm(h_t)]`` with ``h_t`` as residual. ``lm_head(norm(output))`` speaks the draft vocabulary and
  the output before the norm is ``h_{t+1}``.

Source: EAGLE (arXiv 2401.15077), EAGLE-3 (arXiv 2503.01840), and the checkpoints' tensor names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from decoder.errors import UserError, explained
from decoder.model.attention import Placement, ragged_attention
from decoder.model.cache import RaggedCache

from .base import linear_of
from .eagle_config import EagleCheckpoint, EagleConfig


def _part(weights: dict[str, Tensor], name: str, eps: float) -> nn.Module | None:
    """The linear layer (2-D weight) or norm (1-D weight) called ``name``, ``None`` if absent."""
    weight = weights.get(f"{name}.weight")
    if weight is None:
        return None
    if weight.ndim > 1:
        return linear_of(weight, weights.get(f"{name}.bias"))
    norm = nn.RMSNorm(weight.shape[0], eps=eps, device="meta")
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


class HeadLayer(nn.Module):
    """One decoder layer; every norm that the checkpoint has is applied, no other."""

    # Parts exist when the checkpoint has their tensors and are None otherwise.
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any
    gate_proj: Any
    up_proj: Any
    down_proj: Any
    input_layernorm: Any
    hidden_norm: Any
    post_attention_layernorm: Any

    def __init__(self, config: EagleConfig, weights: dict[str, Tensor], index: int) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.config = config
        self.index = index
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            self._add(name, weights, f"layers.{index}.self_attn.{name}")
        for name in ("gate_proj", "up_proj", "down_proj"):
            self._add(name, weights, f"layers.{index}.mlp.{name}")
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            self._add(name, weights, f"layers.{index}.{name}")
        self.act = ACT2FN[config.hidden_act]

    def _add(self, name: str, weights: dict[str, Tensor], full_name: str) -> None:
        setattr(self, name, _part(weights, full_name, self.config.rms_norm_eps))

    def forward(
        self,
        hidden: Tensor,
        embeds: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: RaggedCache,
        placement: Placement,
    ) -> Tensor:
        """``[B, Q, H]`` -> ``[B, Q, H]``; ``embeds`` enters only beside a ``hidden_norm``."""
        residual, x = hidden, hidden
        if self.hidden_norm is not None:
            x = self.hidden_norm(hidden)
            if self.config.norm_before_residual:
                residual = x
            x = torch.cat([self.input_layernorm(embeds), x], dim=-1)
        elif self.input_layernorm is not None:
            x = self.input_layernorm(hidden)
        hidden = residual + self._attend(x, rotary, cache, placement)
        x = self.post_attention_layernorm(hidden)
        return hidden + self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

    def _attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: RaggedCache,
        placement: Placement,
    ) -> Tensor:
        config, D = self.config, self.config.head_dim
        query = self.q_proj(x).unflatten(-1, (config.num_heads, D))
        key = self.k_proj(x).unflatten(-1, (config.num_kv_heads, D))
        value = self.v_proj(x).unflatten(-1, (config.num_kv_heads, D))
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = _rotate(query, *rotary), _rotate(key, *rotary)
        keys, values = cache.update(key.transpose(1, 2), value.transpose(1, 2), self.index)
        out = ragged_attention(
            query,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            placement,
            scale=D**-0.5,
            window=config.windows[self.index],
        )
        return self.o_proj(out.flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of ``[B, Q, heads, D]`` by ``[B, Q, R]`` angles, R <= D."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    turned = turned * cos[:, :, None] + swapped * sin[:, :, None]
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class EagleHead(nn.Module):
    """An EAGLE-1 or EAGLE-3 head attached to a target's embedding and output projection.

    Args:
        checkpoint: from ``load_eagle``.
        embedding: the target's ``[V, H]`` embedding, used unless the head brings its own.
        lm_head: the target's output projection, used unless the head brings its own.

    Raises:
        UserError: the head was trained for a target of another width.
    """

    def __init__(self, checkpoint: EagleCheckpoint, embedding: Tensor, lm_head: nn.Module) -> None:
        super().__init__()
        config = self.config = checkpoint.config
        dtype, device = embedding.dtype, embedding.device
        weights = {name: t.to(device, dtype) for name, t in checkpoint.weights.items()}
        own_embedding = weights.pop("embed_tokens.weight", None)
        # A plain attribute: registering the target's own parameter here would own it twice.
        self._shared = (embedding if own_embedding is None else own_embedding, lm_head)
        if self._shared[0].shape[1] != config.hidden_size:
            raise UserError(
                f"the EAGLE head needs embeddings of width {config.hidden_size}, the target's have "
                f"{embedding.shape[1]} and the head brings none"
            )
        if self._shared[0].shape[0] < embedding.shape[0]:
            raise UserError(
                f"the EAGLE head embeds {self._shared[0].shape[0]} tokens, the target has "
                f"{embedding.shape[0]}"
            )
        eps = config.rms_norm_eps
        self.fc = _part(weights, "fc", eps)
        self.input_norm = _part(weights, "input_norm", eps)
        fc_norms = (_part(weights, f"fc_norm.{i}", eps) for i in range(16))
        self.fc_norm = nn.ModuleList(norm for norm in fc_norms if norm is not None)
        self.embedding_layernorm = _part(weights, "embedding_layernorm", eps)
        self.layers = nn.ModuleList(
            HeadLayer(config, weights, index) for index in range(config.num_layers)
        )
        self.norm = _part(weights, "norm", eps) or _part(weights, "pre_lm_head_layernorm", eps)
        self.lm_head = _part(weights, "lm_head", eps)
        if self.lm_head is None and embedding.shape[1] != config.hidden_size:
            raise UserError(
                f"the EAGLE head brings no lm_head, and its states have width "
                f"{config.hidden_size}, the target's {embedding.shape[1]}"
            )
        self.rotary = _rotary(config, device)
        mapping = checkpoint.draft_to_target
        self.draft_to_target = None if mapping is None else mapping.to(device)
        mask = weights.get("mask_hidden")
        self._mask = None if mask is None else mask.flatten()

    @property
    def embedding(self) -> Tensor:
        """``[V, H]``, its own or the target's."""
        return self._shared[0]

    @property
    def masked(self) -> Tensor:
        """What stands for a hidden state that there is not yet, ``[H]``; of P-EAGLE alone."""
        assert self._mask is not None
        return self.fuse(self._mask)

    @property
    def feature_size(self) -> int:
        """Width of the concatenated target features that ``fuse`` expects."""
        if not isinstance(self.fc, nn.Linear):
            return self.config.hidden_size
        embedding_width = 0 if self.config.kind == "eagle3" else self.config.hidden_size
        return self.fc.in_features - embedding_width

    def fuse(self, features: Tensor) -> Tensor:
        """Target features ``[B, Q, n * H_t]`` to what ``forward`` takes in their place."""
        if self.config.kind == "eagle1" or self.fc is None:
            return features
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm:
            chunks = features.chunk(len(self.fc_norm), dim=-1)
            pairs = zip(self.fc_norm, chunks, strict=True)
            features = torch.cat([norm(chunk) for norm, chunk in pairs], dim=-1)
        return self.fc(features)

    def forward(
        self, tokens: Tensor, hidden: Tensor, cache: RaggedCache, placement: Placement
    ) -> Tensor:
        """See ``Head``: pairs ``(token_{t+1}, hidden_t)`` at positions ``t``."""
        embeds = nn.functional.embedding(tokens, self._shared[0])
        if self.config.kind == "eagle1":
            if self.embedding_layernorm is not None:
                embeds = self.embedding_layernorm(embeds)
            assert self.fc is not None
            hidden = self.fc(torch.cat([embeds, hidden], dim=-1))
        rotary = self.rotary(hidden, placement.positions)
        for layer in self.layers:
            hidden = layer(hidden, embeds, rotary, cache, placement)
        if self.config.norm_output and self.norm is not None:
            hidden = self.norm(hidden)
        return hidden

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """See ``Head``: -inf for a token that ``draft_to_target`` does not lead to."""
        if self.norm is not None and not self.config.norm_output:
            hidden = self.norm(hidden)
        mapping = self.draft_to_target
        scores = (self._shared[1] if self.lm_head is None else self.lm_head)(hidden)
        if mapping is None:
            return scores
        if self.lm_head is None:  # the target's scores of all its tokens
            scores = scores[..., mapping]
        full = scores.new_full((*scores.shape[:-1], vocab_size), -torch.inf)
        return full.index_copy_(-1, mapping, scores)


def _rotary(config: EagleConfig, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "head_dim": config.head_dim,
        **config.rope,
    }
    with explained(f"EAGLE config: its rotary embedding cannot be made of {config.rope}"):
        return LlamaRotaryEmbedding(LlamaConfig(**settings)).to(device)
