"""What a round passes along: the state it starts from, the draft, the verdict.

``StepState`` goes to a drafter, its ``Draft`` to the verify forward and the sampler, whose
``Verdict`` is committed. Everybody imports these; they import nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

HOST_DEVICES = frozenset({"cpu"})


def on_host(device: torch.device) -> bool:
    """Whether looking at a tensor of this device waits for nothing."""
    return device.type in HOST_DEVICES


@dataclass(slots=True)
class StepState:
    """The live rows at the start of a round. Finished rows have been removed by the engine.

    Attributes:
        rows: ``[B]`` int64, the row of each live sequence in every cache and table.
        lengths: ``[B]`` int64, committed tokens with KV in the target cache, which is the absolute
            position of ``current``.
        current: ``[B]`` int64, the last emitted token; its KV is not in the target cache yet.
        previous: ``[B]`` int64, the token at position ``lengths - 1``.
        tokens: ``[max_batch_size + 1, S]`` int64, every token by absolute position (prompt and
            output); ``tokens[rows, lengths] == current``. Owned by the engine, read only here; the
            last row is for padding.
        host_lengths: ``lengths`` as Python integers, so that sizing needs no device sync.
        host_rows: ``rows`` as Python integers; read back from the device when not given.
    """

    rows: Tensor
    lengths: Tensor
    current: Tensor
    previous: Tensor
    tokens: Tensor
    host_lengths: list[int]
    host_rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.host_rows:
            self.host_rows = self.rows.tolist()

    def rows_and_lengths(self) -> list[tuple[int, int]]:
        """``(row, length)`` of every live sequence."""
        return list(zip(self.host_rows, self.host_lengths, strict=True))

    def select(self, kept: Sequence[int]) -> StepState:
        """The state of some of the rows, by their places in the batch."""
        index = torch.tensor(kept, dtype=torch.int64, device=self.rows.device)
        return StepState(
            self.rows[index],
            self.lengths[index],
            self.current[index],
            self.previous[index],
            self.tokens,
            [self.host_lengths[i] for i in kept],
            [self.host_rows[i] for i in kept],
        )


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens together with the distribution each was drawn from.

    Attributes:
        tokens: ``[B, G]`` int64. Entries at or after ``lengths`` are valid vocabulary ids that
            nobody may accept (they are still fed to the verify forward to keep shapes static).
        probs: ``[B, G, V]`` fp32, the distribution that ``tokens`` were drawn from, or ``None``
            for deterministic proposals (one-hot at the token).
        lengths: ``[B]`` int64, valid drafts per row, ``0 <= lengths <= G``.
    """

    tokens: Tensor
    probs: Tensor | None
    lengths: Tensor

    @property
    def gamma(self) -> int:
        return self.tokens.shape[1]

    def row(self, index: int) -> Draft:
        """The draft of one row, by its place in the batch."""
        own = slice(index, index + 1)
        probs = None if self.probs is None else self.probs[own]
        return Draft(self.tokens[own], probs, self.lengths[own])

    def limited(self, room: Sequence[int]) -> Draft | None:
        """The draft with at most ``room[b]`` tokens in row b; ``None`` when none has any.

        On the CPU, where asking costs nothing, columns that no row has drafted are cut.
        """
        lengths = self.lengths.clamp(0, self.gamma)  # a drafter may have cut its tokens alone
        if min(room) < self.gamma:
            lengths = torch.minimum(lengths, torch.tensor(room, device=lengths.device))
        if not on_host(lengths.device):
            return Draft(self.tokens, self.probs, lengths)
        longest = int(lengths.max())
        if longest == 0:
            return None
        probs = self.probs[:, :longest] if self.probs is not None else None
        return Draft(self.tokens[:, :longest], probs, lengths)


class Verdict(NamedTuple):
    """Result of one round.

    Attributes:
        accepted: ``[B]`` int64, how many drafted tokens k are kept.
        tokens: ``[B, G + 1]`` int64, the emitted tokens: k drafts, the next token at index k, then
            -1.
        host_tokens: ``tokens`` on the host, once they are there: reading them would wait again.
    """

    accepted: Tensor
    tokens: Tensor
    host_tokens: list[list[int]] | None = None
