"""How ragged prompts are cut into forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PREFILL_CHUNK = 256  # positions per forward
_PREFILL_TOKENS = 4096  # rows * positions per forward
_PREFILL_OVERHEAD = 64  # tokens whose time a further forward costs


def prefill_parts(lengths: list[int]) -> list[tuple[int, int]]:
    """Where to cut prompts, longest first, so that padding and forwards together cost least."""
    best: list[tuple[int, int]] = [(0, 0)]  # tokens paid for the first n prompts, last part's start
    for end in range(1, len(lengths) + 1):
        options = []
        for start in range(end - 1, -1, -1):
            rows = end - start
            if rows > 1 and rows * min(PREFILL_CHUNK, lengths[start]) > _PREFILL_TOKENS:
                break
            options.append((best[start][0] + _PREFILL_OVERHEAD + rows * lengths[start], start))
        best.append(min(options))
    parts, end = [], len(lengths)
    while end:
        parts.append((best[end][1], end))
        end = best[end][1]
    return parts[::-1]


def prefill_chunks(lengths: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Forwards that read prompts, longest first: rows from, to, and positions from, to."""
    for first, end in prefill_parts(lengths):
        for start in range(0, lengths[first], PREFILL_CHUNK):
            live = sum(length > start for length in lengths[first:end])
            yield first, first + live, start, min(start + PREFILL_CHUNK, lengths[first])


class ForwardOutput(NamedTuple):
    """Attributes: ``logits [B, n, V]`` in the model's dtype, ``hidden [B, Q, n_layers * H]``."""

    logits: Tensor
    hidden: Tensor | None


def prefill(
    forward: Callable[..., ForwardOutput],
    rows: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    hidden_layers: Sequence[int] | None,
) -> ForwardOutput:
    """``ModelRunner.prefill`` by its ``forward``."""
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    logits: Tensor | None = None
    hidden: Tensor | None = None
    for first, end, start, stop in prefill_chunks(sorted_lengths):
        index = order[first:end]
        positions = torch.arange(start, stop, device=token_ids.device).expand(end - first, -1)
        last = lengths[index, None] - 1
        out = forward(
            token_ids[index, start:stop],
            rows[index],
            torch.where(positions <= last, positions, -1),
            hidden_layers=hidden_layers,
            logits_positions=(last - start).clamp(max=stop - start - 1),
            max_position=stop - 1,
            settled=lengths[index].clamp(max=stop),
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


def gather(states: Tensor, index: Tensor | None) -> Tensor:
    """``states[b, index[b, i]]``: ``[B, Q, W]`` and ``[B, n]`` to ``[B, n, W]``."""
    return states if index is None else states.take_along_dim(index[..., None], dim=1)
