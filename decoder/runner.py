"""Runs a transformers causal LM over ragged rows of its own KV cache.

One ``ModelRunner`` per model (target, independent draft). It knows slots, positions and logits; it
does not know sequences (``engine.py``), drafts or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention as ragged
from . import kernels_hook
from .cache import RaggedCache
from .errors import UserError
from .lean import LeanForward, lean_forward

_PREFILL_CHUNK = 256  # positions per prefill forward
_PREFILL_TOKENS = 4096  # rows * positions per prefill forward
_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


class ForwardOutput(NamedTuple):
    """Attributes: ``logits [B, n, V]`` in the model's dtype, ``hidden [B, Q, n_layers * H]``."""

    logits: Tensor
    hidden: Tensor | None


class ModelRunner:
    """A model, its ragged cache, and the forward passes the decoder needs.

    Args:
        model: a transformers causal LM in evaluation mode; its attention implementation is
            switched only while a forward of this runner runs.
        max_batch_size: cache rows.
        max_length: most tokens per row, drafts included.
        attention: ``"auto"`` uses the kernel when there is one, ``"portable"`` never does.

    Raises:
        UserError: the architecture cannot be run over a ragged cache, with the reason.
    """

    def __init__(
        self,
        model: Any,
        max_batch_size: int,
        max_length: int,
        attention: str = "auto",
    ) -> None:
        if attention not in ("auto", "portable"):
            raise ValueError(f"attention must be 'auto' or 'portable', got {attention!r}")
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        check_supported(self.model)
        self._head = self.model.get_output_embeddings()
        self._base = self.model.base_model
        weight = self._head.weight
        self.device, self.dtype = self.model.get_input_embeddings().weight.device, weight.dtype
        self.vocab_size: int = weight.shape[0]
        self.hidden_size: int = self.config.hidden_size
        self.num_layers: int = self.config.num_hidden_layers
        self.max_batch_size, self.max_length = max_batch_size, max_length
        self.cache = RaggedCache(
            max_batch_size, max_length, None if self.device.type == "cpu" else max_length
        )
        self._op = (
            kernels_hook.ragged_attention_op(self.device, self.dtype)
            if attention == "auto"
            else None
        )
        self._windows: dict[int, int] = {}
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._configs = _attention_configs(self.model)
        self._lean: LeanForward | None = None
        self._split_head = self._probe()

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        *,
        hidden_layers: Sequence[int] | None = None,
        logits_positions: Tensor | None = None,
        max_position: int | None = None,
    ) -> ForwardOutput:
        """Write the tokens' keys and values at their positions and return logits.

        Args:
            input_ids: ``[B, Q]`` int64.
            slots: ``[B]`` int64 cache rows.
            positions: ``[B, Q]`` int64 absolute positions; -1 marks padding, which writes nothing
                visible and whose outputs are meaningless.
            hidden_layers: indices into transformers' ``hidden_states`` to return, concatenated.
            logits_positions: ``[B, n]`` int64 indices into Q; ``None`` is all of them. ``n = 0``
                computes no logits.
            max_position: largest position, when the caller knows it: spares a device sync.
        """
        if max_position is None:
            max_position = int(positions.max())
        self.cache.reserve(max_position + 1)
        self.cache.select(slots, positions)
        placement = self._placement(slots, positions, max_position + 1)
        position_ids = positions.clamp(min=0)
        if self._lean is not None:
            states, kept = self._lean(input_ids, position_ids, placement, hidden_layers)
            if logits_positions is not None:
                states = _gather(states, logits_positions)
            hidden = torch.cat(kept, dim=-1) if hidden_layers is not None else None
            return ForwardOutput(self._head(states), hidden)
        with ragged.placed(placement), self._ragged_attention():
            return self._run(input_ids, position_ids, hidden_layers, logits_positions)

    @torch.inference_mode()
    def prefill(
        self,
        slots: Tensor,
        token_ids: Tensor,
        lengths: Tensor,
        *,
        hidden_layers: Sequence[int] | None = None,
    ) -> ForwardOutput:
        """Fill rows with prompts, in chunks of bounded size.

        Args:
            slots: ``[R]`` int64 cache rows.
            token_ids: ``[R, L]`` int64, right padded.
            lengths: ``[R]`` int64 prompt lengths, at least 1.
            hidden_layers: as in ``forward``; hidden states of padding are zero.

        Returns:
            ``logits [R, 1, V]`` at each row's last prompt token, and ``hidden [R, L, n * H]``.
        """
        order = torch.argsort(lengths, descending=True, stable=True)
        sorted_lengths = lengths[order].tolist()
        rows = max(1, _PREFILL_TOKENS // min(_PREFILL_CHUNK, max(sorted_lengths)))
        logits: Tensor | None = None
        hidden: Tensor | None = None
        for first in range(0, len(sorted_lengths), rows):
            part = order[first : first + rows]
            part_lengths = sorted_lengths[first : first + rows]
            for start in range(0, part_lengths[0], _PREFILL_CHUNK):
                live = sum(length > start for length in part_lengths)
                index = part[:live]
                stop = min(start + _PREFILL_CHUNK, part_lengths[0])
                positions = torch.arange(start, stop, device=token_ids.device).repeat(live, 1)
                last = lengths[index, None] - 1
                out = self.forward(
                    token_ids[index, start:stop],
                    slots[index],
                    torch.where(positions <= last, positions, -1),
                    hidden_layers=hidden_layers,
                    logits_positions=(last - start).clamp(max=stop - start - 1),
                    max_position=stop - 1,
                )
                if logits is None:
                    logits = out.logits.new_zeros(len(sorted_lengths), 1, out.logits.shape[-1])
                # A row's last chunk comes last, so what stays is the logits of its last token.
                logits[index] = out.logits
                if out.hidden is not None:
                    if hidden is None:
                        hidden = out.hidden.new_zeros(*token_ids.shape, out.hidden.shape[-1])
                    hidden[index, start:stop] = out.hidden * (positions <= last)[..., None]
        assert logits is not None
        return ForwardOutput(logits, hidden)

    def _run(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        hidden_layers: Sequence[int] | None,
        logits_positions: Tensor | None,
    ) -> ForwardOutput:
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "past_key_values": self.cache,
            "attention_mask": self._no_mask,
            "use_cache": True,
        }
        if hidden_layers is not None:
            inputs["output_hidden_states"] = True
        if self._split_head:
            out = self._base(**inputs)
            states = out.last_hidden_state
            if logits_positions is not None:
                states = _gather(states, logits_positions)
            logits = self._head(states)
        else:
            out = self.model(**inputs)
            logits = out.logits
            if logits_positions is not None:
                logits = _gather(logits, logits_positions)
        hidden = None
        if hidden_layers is not None:
            hidden = torch.cat([out.hidden_states[layer] for layer in hidden_layers], dim=-1)
        return ForwardOutput(logits, hidden)

    def _placement(self, slots: Tensor, positions: Tensor, length: int) -> ragged.Placement:
        if self._op is not None:
            return ragged.Placement(slots, positions, length, self._op, self._windows)
        view = min(-(-length // 64) * 64, self.cache.slots_per_row)
        identity = slots.device.type == "cpu" and slots.tolist() == list(range(len(slots)))
        return ragged.Placement(None if identity else slots, positions, view, None, self._windows)

    @contextmanager
    def _ragged_attention(self) -> Any:
        previous = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = ragged.NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, previous, strict=True):
                config._attn_implementation_internal = name

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Run two tokens: learn the windows, whether logits are ``lm_head(base(...))``, and
        whether the lean forward gives the very same states."""
        ragged.register()
        # Not the padding token: its embedding is zero, and scaled zeros would compare equal.
        pad = getattr(self.config, "pad_token_id", None)
        ids = torch.tensor([[i for i in range(3) if i != pad][:2]], device=self.device)
        slots = torch.zeros(1, dtype=torch.long, device=self.device)
        positions = torch.arange(2, device=self.device)[None]
        self.cache.select(slots, positions)
        placement = self._placement(slots, positions, 2)
        placement.probing = True
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        refusal = (
            f"{type(self.model).__name__} cannot be decoded over a ragged cache: expected every "
            "layer to use transformers' attention interface and its cache, got "
        )
        with ragged.placed(placement), self._ragged_attention():
            try:
                logits = self.model(**inputs).logits
            except (RuntimeError, TypeError, NotImplementedError) as error:
                first_line = str(error).partition("\n")[0]
                raise UserError(f"{refusal}{type(error).__name__}: {first_line}") from error
            written = len(self.cache.ragged_layers)
            if not placement.windows or len(placement.windows) != written:
                calls = len(placement.windows)
                raise UserError(f"{refusal}{calls} attention calls for {written} cached layers")
            states = self._base(**inputs).last_hidden_state
            split = bool(torch.equal(self._head(states), logits))
        if split and self._op is not None:
            lean = lean_forward(self.model, self.cache, self._windows, self.max_length)
            if lean is not None and torch.equal(lean(ids, positions, placement)[0], states):
                self._lean = lean
        return split


def check_supported(model: Any) -> None:
    """Refuse models whose past cannot be rolled back by masking.

    Raises:
        UserError: recurrent, chunked or encoder-decoder architectures.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model; expected a decoder-only causal LM")
    layers = set(getattr(config, "layer_types", None) or ())
    exotic = sorted(layers - _SUPPORTED_LAYERS)
    if exotic or getattr(model, "_is_stateful", False):
        kinds = ", ".join(exotic) or "recurrent state"
        raise UserError(
            f"{name} has {kinds} layers, whose state cannot be rolled back when drafted tokens are "
            f"rejected; supported are {' and '.join(sorted(_SUPPORTED_LAYERS))}"
        )
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} has no language-model head; expected a causal LM")


def _attention_configs(model: torch.nn.Module) -> list[Any]:
    """Every distinct config object that a module of ``model`` reads its attention choice from."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """``states[b, index[b, i]]``: ``[B, Q, W]`` and ``[B, n]`` to ``[B, n, W]``."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
