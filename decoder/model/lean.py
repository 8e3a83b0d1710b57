"""The forward of Llama-shaped models with the interpreter's share taken out.

On a CPU the decode step of a small model is mostly Python: module calls, wrappers, mask set-up,
three projections where one does; on a GPU it is dozens of small launches a layer. Here a stack
walks the same layers, in C++ on a CPU and with few Triton kernels on a GPU; cosines are read from a
table, and queries, keys and values projected at once. MLPs that the stack does not know run as the
modules they are. It is used only where a probe finds its states those of the model's own forward
(``ModelRunner``): on a CPU bit for bit, on a GPU but for the order of sums. So that forward remains
the reference; everything else keeps transformers' code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from . import kernels
from .attention import Placement
from .cache import RaggedCache
from .probe import LENGTH, Step

logger = logging.getLogger(__name__)

# Layers of exactly: norm, attention (maybe with per-head norms), add, norm, mlp, add.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe", "Mixtral")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # cosines depend on the position alone


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
        base, self._walk = model.base_model, kernels.walk()
        walk = self._walk
        self._embedding: Tensor = base.embed_tokens.weight
        # Of each layer's input, then the final one: each follows an addition, except the first.
        norms = [*(layer.input_layernorm for layer in base.layers), base.norm]
        self._norms = list(map(walk.norm_of, norms))
        self._mlps = [layer.mlp for layer in base.layers]
        self._stack = walk.layer_stack(model)
        # Whether the stack has every MLP, and the head is a matrix alone.
        head = model.get_output_embeddings()
        self.head = walk.head_of(model)
        self.whole = walk.runs_linear(head)
        for layer, following in zip(base.layers, self._norms[1:], strict=True):
            window = windows.get(id(layer.self_attn), 0)
            walk.add_attention(self._stack, layer, following, window)
            self.whole &= walk.set_mlp(self._stack, layer.mlp)
        if self.whole:
            walk.tell_format(self._stack, "head", walk.stored_weight(head))
        # Whether it can also walk from step to step; on a GPU graphs spare the interpreter.
        on_gpu = kernels.on_gpu(self._embedding.device)
        self.walks_steps = self.whole and head.bias is None and not on_gpu
        self.limits_experts = on_gpu  # of a token, in a walk that is asked to
        self._cache = cache
        self._max_length = max(max_length, LENGTH)  # rows may be shorter than the trial's
        self._rotary = base.rotary_emb
        self._tables: tuple[Tensor, Tensor] | None = None
        self.num_layers = len(base.layers)

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        placement: Placement,
        hidden_layers: Sequence[int] | None = None,
        columns: Tensor | None = None,
        most_experts: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states ``[B, n, H]``, and the inputs of the asked layers.

        Args:
            input_ids: ``[B, Q]``; position_ids: ``[B, Q]``, 0 where padding.
            placement: of this forward; the cache has been told its write positions.
            hidden_layers: indices into transformers' ``hidden_states``.
            columns: ``[B, n]`` indices into Q of the final states wanted, which the last layer
                then computes alone; ``None`` is all of them, as asked layers need it.
            most_experts: of a token. Where the stack does not limit them, MLPs run as modules, and
                a hook of the caller's does.
        """
        walked = most_experts is None or self.limits_experts
        B, H = len(input_ids), self._embedding.shape[1]
        wanted = _resolved(hidden_layers, self.num_layers)
        stops = sorted({*wanted, self.num_layers})
        kept: dict[int, Tensor] = {}
        x = torch.embedding(self._embedding, input_ids.reshape(-1))  # [T, H]
        weight, eps = self._norms[0]
        states = self._walk.rms_norm(x, weight, eps)
        keys, values = self._slabs()
        cos, sin = self._angles(position_ids.reshape(-1))
        written, positions, rows = self._cache.write_index, placement.positions, placement.rows
        layer = 0
        for stop in stops:
            while layer < stop:
                # By position: the stack's arguments have no names (csrc/cpu/ops/layers.cpp).
                x, states, layer = self._walk.run_layers(
                    self._stack, placement.view_length, x, states, cos, sin, written, positions,
                    rows, keys, values, layer, stop, walked, columns, most=most_experts,
                )  # fmt: skip
                if layer < stop:  # this layer's MLP is not the stack's
                    delta = self._mlps[layer](states.view(B, -1, H)).reshape(-1, H)
                    layer += 1
                    weight, eps = self._norms[layer]
                    x, states = self._walk.add_rms_norm(x, delta, weight, eps)
            kept[stop] = x.view(B, -1, H)
        kept[self.num_layers] = last = states.view(B, -1, H)
        return last, [kept[index] for index in wanted]

    def equals(
        self,
        states: Tensor,
        step: Step,
        placement: Placement,
        is_rounding: Callable[[float, torch.dtype], bool],
    ) -> bool:
        """Whether this gives the ``states`` ``[R, Q, H]`` of the model's base for a step.

        ``is_rounding`` tells of a share by which results of a dtype differ.
        """
        ours = self(step.input_ids, step.positions.clamp(min=0), placement)[0]
        apart = self._walk.states_apart(ours[step.checked], states[step.checked])
        alike = is_rounding(apart, states.dtype)
        if not alike:
            logger.info("module by module: without them, states differ by %.1f %%", 100 * apart)
        return alike

    def continue_greedily(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, head: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """What ``count`` forwards, each fed the last one's most probable token, would choose.

        Args:
            input_ids: ``[B, W]`` newest tokens, the latest in the last column.
            positions: ``[B, W]``, -1 where padding; the cache has room for ``count - 1`` more.
            rows: ``[B]`` cache rows.
            head: ``[V, H]`` output projection.
            count: tokens to choose, at least 1.

        Returns:
            Tokens ``[B, count]``, and bool ``[B, count]``: logits that had no largest value.
        """
        weight, eps = self._norms[0]
        cos, sin = self._by_position()
        keys, values = self._slabs()
        return self._stack.continue_greedily(
            input_ids, positions, rows, self._embedding, weight, eps, head,
            cos, sin, keys, values, count,
        )  # fmt: skip

    def _slabs(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        layers = self._cache.ragged_layers
        return [layer.keys for layer in layers], [layer.values for layer in layers]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, D]`` of the positions."""
        cos, sin = self._by_position()
        return torch.embedding(cos, positions), torch.embedding(sin, positions)

    def _by_position(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[max_length, D]``, from the model's own rotary module."""
        if self._tables is None or self._tables[0].dtype != self._embedding.dtype:
            every = torch.arange(self._max_length, device=self._embedding.device)[None]
            cos, sin = self._rotary(self._embedding, every)
            self._tables = cos[0], sin[0]
        return self._tables


def lean_forward(
    model: Any, cache: RaggedCache, windows: dict[int, int], max_length: int
) -> LeanForward | None:
    """A lean forward where the model's shape is known and its modules run our kernels."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if family not in _FAMILIES or rope.get("rope_type", "default") not in _STATIC_ROPE:
        return None
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return None
    try:
        obstacle = _obstacle(model.base_model, family)
        if obstacle is not None:
            logger.info("%s runs module by module: %s", type(model).__name__, obstacle)
            return None
        return LeanForward(model, cache, windows, max_length)
    except AttributeError:  # a variant without one of the parts
        return None


def watched_tensors(model: Any) -> list[Tensor]:
    """Weights that a lean forward has joined, and so holds apart from the model's parameters."""
    parts = (
        part for layer in model.base_model.layers for part in kernels.walk().projections(layer)
    )
    return [tensor for part in parts for tensor in part]


def _obstacle(base: Any, family: str) -> str | None:
    """Why somebody would miss the calls of the modules that a lean forward runs past, or None.

    They must be transformers' own and on our kernels, which compute rows independently, without a
    hook, an adapter or another forward on them.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are hooks on all modules"
    walk, expected = kernels.walk(), {base: "Model", base.rotary_emb: "RotaryEmbedding"}
    linears, norms = [], [base.norm]
    for layer in base.layers:
        attention = layer.self_attn
        expected |= {layer: "DecoderLayer", attention: "Attention"}
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None))]
    embedding, own = base.embed_tokens, type(base).__module__
    other = [m for m, name in expected.items() if type(m).__name__ != family + name]
    other += [m for m in expected if type(m).__module__ != own or not walk.is_plain(m)]
    # Somebody may have put another forward into a class.
    other += [m for m in expected if type(m).forward.__module__ != own]
    if type(embedding) is not nn.Embedding or embedding.max_norm or not walk.is_plain(embedding):
        other.append(embedding)
    other += [m for m in (base.layers,) if not walk.is_plain(m)]
    other += [m for m in linears if not walk.runs_linear(m)]
    other += [m for m in norms if not walk.runs_norm(m)]
    if other:
        names = {module: name for name, module in base.named_modules()}
        return (
            f"{names[other[0]] or 'the model'} ({type(other[0]).__name__}) has a hook, an adapter, "
            "a forward or a class of its own, or weights that our kernels do not take"
        )
    obstacles = (walk.joining_obstacle(layer) for layer in base.layers)
    return next(filter(None, obstacles), None)


def _resolved(layers: Sequence[int] | None, count: int) -> list[int]:
    """Non-negative indices into ``count + 1`` hidden states."""
    return [layer % (count + 1) for layer in layers or ()]
