"""A multi-token-prediction head as a module on the decoder's own ragged cache and attention.

``x_t = projection([norm(embed(token_{t+1})), norm(hidden_t)])`` runs through one decoder layer of
the target's family and a norm; the output stands for the target's hidden state at ``t + 1``. The
layer is transformers' own, in a model of that family with no other: so it has its rotary embedding
and final norm beside it, and is called as in the target.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from decoder.model import attention
from decoder.model.attention import Placement
from decoder.model.cache import RaggedCache, cache_argument
from decoder.model.support import attention_configs, attention_named

from .base import linear_of


class MtpHead(nn.Module):
    """One head.

    Args:
        base: transformers' base model of the target's family, with one layer; its final norm is
            the head's.
        weights: of ``embedding_norm``, ``hidden_norm`` and ``projection``, the last maybe with a
            bias, and maybe of ``embedding`` and ``lm_head``.
        target: the target, whose embedding and output projection serve unless it brings its own.
        hidden_first: see ``MtpLayout``.

    Attributes:
        base: as given.
        around: what of the head is not in ``base``.
    """

    def __init__(
        self, base: Any, weights: dict[str, Tensor], target: Any, *, hidden_first: bool
    ) -> None:
        super().__init__()
        self.base = base
        self.around = nn.ModuleDict(
            {
                "embedding_norm": _norm_like(base.norm, weights["embedding_norm.weight"]),
                "hidden_norm": _norm_like(base.norm, weights["hidden_norm.weight"]),
                "projection": linear_of(
                    weights["projection.weight"], weights.get("projection.bias")
                ),
            }
        )
        if "embedding.weight" in weights:
            self.around["embedding"] = _embedding(weights["embedding.weight"])
        if "lm_head.weight" in weights:
            self.around["lm_head"] = linear_of(weights["lm_head.weight"])
        self._hidden_first = hidden_first
        # Not registered: the target's own modules would be owned twice.
        self._target = target.get_input_embeddings(), target.get_output_embeddings()
        self._cache_argument = cache_argument(base)
        self._configs = attention_configs(base)
        self.register_buffer("_no_mask", torch.zeros(1, 1, 1, 1, dtype=torch.bool))
        attention.register()

    def fuse(self, features: Tensor) -> Tensor:
        """See ``Head``: the target's last hidden state is read as it is."""
        return features

    def forward(
        self, tokens: Tensor, hidden: Tensor, cache: RaggedCache, placement: Placement
    ) -> Tensor:
        """See ``Head``: pairs ``(token_{t+1}, hidden_t)`` at positions ``t``."""
        embeds = self._end("embedding", 0)(tokens)
        pair = [self.around["embedding_norm"](embeds), self.around["hidden_norm"](hidden)]
        if self._hidden_first:
            pair.reverse()
        inputs = {
            "inputs_embeds": self.around["projection"](torch.cat(pair, dim=-1)),
            "position_ids": placement.positions.clamp(min=0),
            "attention_mask": self._no_mask,
            "use_cache": True,
            self._cache_argument: cache,
        }
        with attention_named(attention.NAME, self._configs):
            output: Tensor = self.base(**inputs).last_hidden_state
        return output

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """See ``Head``."""
        scores: Tensor = self._end("lm_head", 1)(hidden)
        return scores

    def _end(self, name: str, place: int) -> Any:
        """Its own, if it has one, or the target's."""
        return self.around[name] if name in self.around else self._target[place]


def _norm_like(norm: nn.Module, weight: Tensor) -> nn.Module:
    """Another norm of this class: families differ in what they do with the weight."""
    made = copy.deepcopy(norm)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def _embedding(weight: Tensor) -> nn.Embedding:
    made = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made
