"""The ragged KV cache: every row at its own length, rollback without copying.

Invariant: place in the row == absolute position == RoPE position, and a query at position p sees
exactly the positions <= p. Rolling back rejected tokens is therefore a smaller length and nothing
else: they lie beyond every later query until they are written again.

This file stores keys and values, and passes layers with a recurrent state on to ``recurrent/``. It
does not mask (``attention.py``) and does not know lengths (``engine/batch.py``).
"""

from __future__ import annotations

import inspect
import weakref
from functools import partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .recurrent.states import RecurrentStates

_BUCKET = 256  # positions are added in multiples of it, doubling
ROW_BLOCK = 64  # a row is whole blocks: a GPU's attention takes views of them without padding


class RaggedCache(Cache):
    """Key/value slabs ``[rows, S, kv_heads, D]``, one per layer, for transformers models.

    Rows are a multiple of ``ROW_BLOCK`` positions long. The last of each is the bin: a padding
    query (position -1) writes there, and no query's position ever reaches it.

    Args:
        max_batch_size: number of rows.
        max_length: most tokens a row may hold.
        initial_length: tokens a row can hold before the first growth; ``None`` picks a small one.
            Growing moves the slabs, so CUDA graphs need ``initial_length=max_length``.
        recurrent: of a model with layers that have no keys and values.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_length: int,
        initial_length: int | None = None,
        recurrent: RecurrentStates | None = None,
    ) -> None:
        # Layers appear as the model first writes to them; the list keeps their precise type.
        self.ragged_layers: list[RaggedLayer] = []
        # Weakly: slabs of gigabytes go when the cache does, not when the collector next runs.
        self._new_layer = partial(RaggedLayer, weakref.proxy(self))
        super().__init__(layer_class_to_replicate=self._new_layer)  # type: ignore[arg-type]
        self.recurrent = recurrent
        self.num_rows = max_batch_size
        self.max_length = max_length
        self.row_length = whole_blocks(min(initial_length or _BUCKET - 1, max_length) + 1)
        self.write_index: Tensor | None = None  # [B * Q] into the flattened (row, position) axis

    def select(self, rows: Tensor, positions: Tensor) -> None:
        """Choose where the next forward writes.

        Args:
            rows: ``[B]`` int64 cache rows.
            positions: ``[B, Q]`` int64 absolute positions, -1 for padding queries. The caller has
                called ``reserve`` for the largest one.
        """
        S = self.row_length
        # remainder sends position -1 to the last one, the bin.
        self.write_index = torch.add(positions.remainder(S), rows[:, None], alpha=S).view(-1)

    def reserve(self, length: int) -> None:
        """Make room for rows of ``length`` tokens.

        Raises:
            ValueError: ``length`` exceeds ``max_length``.
        """
        if length > self.max_length:
            raise ValueError(f"a row must hold at most {self.max_length} tokens, got {length}")
        if length < self.row_length:
            return
        S = self.row_length
        while length >= S:
            S = 2 * S if S > _BUCKET else S + _BUCKET
        self.row_length = min(S, whole_blocks(self.max_length + 1))
        for layer in self.ragged_layers:
            layer.grow(self.row_length)

    @torch.inference_mode()  # forwards made the slabs in it
    def scrub(self, row: int | slice, start: int = 0) -> None:
        """Zero a row from ``start`` on: what is masked takes part as 0 * value, and 0 * NaN is NaN.

        For rows that have met undefined numbers or a trial's; their places are given to others.
        """
        for layer in self.ragged_layers:
            for slab in (layer.keys, layer.values):
                if slab is not None:
                    slab[row, start:] = 0
        if self.recurrent is not None:
            self.recurrent.scrub(row, start)

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        slabs = [slab for layer in self.ragged_layers for slab in (layer.keys, layer.values)]
        held = sum(slab.nbytes for slab in slabs if slab is not None)
        return held + (self.recurrent.nbytes() if self.recurrent is not None else 0)

    # transformers' interface of recurrent layers: told that nothing is there yet, they take the
    # whole of a forward at once, through functions that find the states by themselves.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return False

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        """Note which layer it is that computes next; inputs ``[B, C, Q]`` are returned as given."""
        if self.recurrent is None:
            raise NotImplementedError("a recurrent layer in a model that was taken to have none")
        self.recurrent.enter(layer_idx, state_idx)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        return recurrent_states


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache.

    transformers 5.24 renames it, remote code may not; Mamba has always had a name of its own.
    """
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "cache_params") if name in taken), "past_key_values")


def whole_blocks(length: int) -> int:
    """``length`` rounded up to a multiple of ``ROW_BLOCK``."""
    return -(-length // ROW_BLOCK) * ROW_BLOCK


class RaggedLayer(CacheLayerMixin):
    """One layer's slabs; created by the model's first forward, which tells heads, widths, dtype.

    Args:
        owner: the cache, or a weak proxy of it; the layer takes the next place in its list.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, owner: RaggedCache) -> None:
        super().__init__()
        self._owner = owner
        owner.ragged_layers.append(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate slabs for ``[B, kv_heads, Q, D]`` states."""
        shape = (self._owner.num_rows, self._owner.row_length)
        # Zeros, never empty: a masked position still takes part as 0 * value, and 0 * NaN is NaN.
        heads, width = key_states.shape[1], key_states.shape[3]
        self._hold(
            key_states.new_zeros(*shape, heads, width),
            value_states.new_zeros(*shape, value_states.shape[1], value_states.shape[3]),
        )
        self.is_initialized = True

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        # [rows * S, kv_heads * D] each, as views
        self.flat = keys.flatten(2).flatten(0, 1), values.flatten(2).flatten(0, 1)
        self._views = keys.transpose(1, 2), values.transpose(1, 2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write ``[B, kv_heads, Q, D]`` states and return views of the whole slabs.

        Returns:
            ``[rows, kv_heads, S, D]`` views; the ragged attention function reads the selected
            rows from them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        width, value_width = (slab.shape[1] for slab in self.flat)
        self.write(
            self._owner.write_index,
            key_states.transpose(1, 2).reshape(-1, width),
            value_states.transpose(1, 2).reshape(-1, value_width),
        )
        return self._views

    def write(self, index: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Write ``[B * Q, kv_heads * D]`` rows at the places that ``select`` chose."""
        assert index is not None, "RaggedCache.select must precede the forward"
        for slab, states in zip(self.flat, (keys, values), strict=True):
            slab.index_copy_(0, index, states)

    def grow(self, row_length: int) -> None:
        """Move to slabs whose rows are ``row_length`` positions long."""
        if self.keys is not None and self.values is not None:
            self._hold(_grown(self.keys, row_length), _grown(self.values, row_length))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.row_length, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always passed to the model, so nothing may be derived from this

    def get_max_length(self) -> int:
        return self._owner.max_length


def _grown(slab: Tensor, row_length: int) -> Tensor:
    grown = slab.new_zeros(slab.shape[0], row_length, *slab.shape[2:])
    grown[:, : slab.shape[1]] = slab  # the old bin holds garbage but lies beyond every length
    return grown
