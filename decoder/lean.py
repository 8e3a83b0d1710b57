"""The forward of Llama-shaped models with the interpreter's share taken out.

On a CPU the decode step of a small model is mostly Python: module calls, wrappers, mask set-up,
three projections where one does. This walks the same layers with the same kernels, reads cosines
from a table, and projects queries, keys and values at once. It is used only where a probe finds
its logits bit-identical to the model's own forward (``ModelRunner``), so that forward remains the
reference; everything else keeps transformers' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import Placement, ragged_attention
from .cache import RaggedCache, RaggedLayer

# Layers of exactly: norm, attention (maybe with per-head norms), add, norm, mlp, add.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe", "Mixtral")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # cosines depend on the position alone


class _Layer(NamedTuple):
    """What one layer's walk touches, looked up once."""

    qkv: Tensor  # [(Hq + 2 Hkv) * D, H]
    qkv_bias: Tensor | None
    q_norm: tuple[Tensor | None, float]
    k_norm: tuple[Tensor | None, float]
    out: Tensor
    out_bias: Tensor | None
    post_norm: tuple[Tensor, float]
    mlp: nn.Module
    scale: float
    window: int
    cache: RaggedLayer
    q_heads: int
    kv_heads: int


class LeanForward:
    """A model's base forward over a ragged cache.

    Args:
        model: a causal LM of one of the known families whose linears and norms already run on
            ``moesd_kernels``.
        cache: its cache, whose layers exist (the model has run once).
        windows: sliding window per attention module, by ``id``.
        max_length: largest position + 1.
    """

    def __init__(
        self, model: Any, cache: RaggedCache, windows: dict[int, int], max_length: int
    ) -> None:
        base = model.base_model
        self._embedding: Tensor = base.embed_tokens.weight
        self._layers = [
            _read_layer(layer, cache.ragged_layers[i], windows)
            for i, layer in enumerate(base.layers)
        ]
        # Of each layer's input, then the final one: each follows an addition, except the first.
        self._norms = [_norm(layer.input_layernorm) for layer in base.layers] + [_norm(base.norm)]
        self._cache = cache
        self._max_length = max_length
        self._rotary = base.rotary_emb
        self._tables: tuple[Tensor, Tensor] | None = None
        self.num_layers = len(self._layers)

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        placement: Placement,
        hidden_layers: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states ``[B, Q, H]``, and the inputs of the asked layers.

        Args:
            input_ids: ``[B, Q]``; position_ids: ``[B, Q]``, 0 where padding.
            placement: of this forward; the cache has been told its write positions.
            hidden_layers: indices into transformers' ``hidden_states``.
        """
        linear, add_norm = torch.ops.moesd.linear.default, torch.ops.moesd.add_rms_norm.default
        B, Q = input_ids.shape
        wanted = _resolved(hidden_layers, self.num_layers)
        kept: dict[int, Tensor] = {}
        x = torch.embedding(self._embedding, input_ids.reshape(-1))  # [T, H]
        states = torch.ops.moesd.rms_norm.default(x, *self._norms[0])
        cos, sin = self._angles(position_ids.reshape(-1))
        for index, layer in enumerate(self._layers):
            if index in wanted:
                kept[index] = x.view(B, Q, -1)
            qkv = linear(states, layer.qkv, layer.qkv_bias)
            attended = self._attend(layer, qkv, cos, sin, placement, B, Q)
            x, states = add_norm(x, linear(attended, layer.out, layer.out_bias), *layer.post_norm)
            delta = layer.mlp(states.view(B, Q, -1)).view(B * Q, -1)
            x, states = add_norm(x, delta, *self._norms[index + 1])
        last = states.view(B, Q, -1)
        kept[self.num_layers] = last
        return last, [kept[index] for index in wanted]

    def _attend(
        self,
        layer: _Layer,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        placement: Placement,
        B: int,
        Q: int,
    ) -> Tensor:
        cache = layer.cache
        assert cache.keys is not None and cache.values is not None
        queries = torch.ops.moesd.rope_to_cache.default(
            *(qkv, cos, sin, *layer.q_norm, *layer.k_norm, self._cache.write_index),
            *(layer.q_heads, layer.kv_heads, *cache.flat),
        )
        out = ragged_attention(
            queries.view(B, Q, layer.q_heads, -1),
            cache.keys,
            cache.values,
            placement,
            scale=layer.scale,
            window=layer.window,
        )
        return out.view(B * Q, -1)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, D]``, from the model's own rotary module."""
        if self._tables is None or self._tables[0].dtype != self._embedding.dtype:
            every = torch.arange(self._max_length, device=positions.device)[None]
            cos, sin = self._rotary(self._embedding, every)
            self._tables = cos[0], sin[0]
        cos, sin = self._tables
        return torch.embedding(cos, positions), torch.embedding(sin, positions)


def lean_forward(
    model: Any, cache: RaggedCache, windows: dict[int, int], max_length: int
) -> LeanForward | None:
    """A lean forward where the model's shape is known and its modules run our kernels."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if family not in _FAMILIES or rope.get("rope_type", "default") not in _STATIC_ROPE:
        return None
    base = model.base_model
    plain = [base.norm, *(layer.self_attn.q_proj for layer in base.layers)]
    # Only modules that accelerate() has taken over compute rows independently with these kernels.
    if not all("forward" in vars(module) for module in plain) or base._forward_hooks:
        return None
    try:
        return LeanForward(model, cache, windows, max_length)
    except AttributeError:  # a variant without one of the parts
        return None


def _read_layer(layer: Any, cache: RaggedLayer, windows: dict[int, int]) -> _Layer:
    attention = layer.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [p.bias for p in projections]
    head_dim = attention.head_dim
    has_norms = getattr(attention, "q_norm", None) is not None
    return _Layer(
        _joined([p.weight for p in projections]),
        None if biases[0] is None else _joined(biases),
        _norm(attention.q_norm) if has_norms else (None, 0.0),
        _norm(attention.k_norm) if has_norms else (None, 0.0),
        attention.o_proj.weight,
        attention.o_proj.bias,
        _norm(layer.post_attention_layernorm),
        layer.mlp,
        attention.scaling,
        windows.get(id(attention), 0),
        cache,
        projections[0].weight.shape[0] // head_dim,
        projections[1].weight.shape[0] // head_dim,
    )


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon


def _joined(parameters: list[nn.Parameter]) -> Tensor:
    """The parameters as one tensor along dimension 0, without a second copy.

    The first time, the parameters become views of the joined tensor; a second runner over the same
    model finds them adjacent and takes them as they are.
    """
    sizes = [p.shape[0] for p in parameters]
    first = parameters[0]
    starts = [p.data_ptr() - first.data_ptr() for p in parameters]
    stored = [sum(p.nbytes for p in parameters[:i]) for i in range(len(parameters))]
    same = {p.untyped_storage().data_ptr() for p in parameters}
    if starts == stored and len(same) == 1:
        shape = (sum(sizes), *first.shape[1:])
        return first.data.as_strided(shape, first.stride(), first.storage_offset())
    joined = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, joined.split(sizes), strict=True):
        parameter.data = part
    return joined


def _resolved(layers: Sequence[int] | None, count: int) -> list[int]:
    """Non-negative indices into ``count + 1`` hidden states."""
    return [layer % (count + 1) for layer in layers or ()]
