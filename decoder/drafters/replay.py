"""Replay drafter: acceptance as a controlled variable, for measurements.

It proposes a recorded continuation of the target itself and corrupts each token independently with
probability ``1 - alpha``. Under greedy decoding a clean token is always accepted and a corrupted
one always rejected, so the measured acceptance rate is ``alpha`` while every verification is the
real one. After a rejection the target emits the recorded token anyway, so recordings are indexed
by absolute position and the row continues along them.

It is a measuring instrument: it needs to have seen the answer, and never speeds up real work.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decoder.errors import UserError
from decoder.round import Draft, StepState

from .base import Drafter, graphs_of

if TYPE_CHECKING:
    from decoder.model.runner import ModelRunner
    from decoder.round import Verdict
    from decoder.sampling import Sampler

Prompt = tuple[int, ...]


def position_noise(seeds: Tensor, positions: Tensor) -> Tensor:
    """Uniform noise in [0, 1) as a pure function of seed ``[B]`` and position ``[B, G]``, fp64.

    Two rounds of a 32-bit xor-multiply hash in int64 arithmetic. Independent of the sampler's own
    streams, so corruption never correlates with what the verifier draws.
    """
    mask = 0xFFFFFFFF
    x = (seeds[:, None] * 0x9E3779B1 + positions * 0x85EBCA6B) & mask
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = ((x ^ (x >> 16)) * multiplier) & mask
    return (x ^ (x >> 16)).double() / 2**32


class ReplayDrafter:
    """Propose recorded continuations, corrupted to a chosen acceptance rate.

    A prompt without a recording is recorded instead: its row proposes nothing and its output is
    remembered at release, so one autoregressive pass over the prompts arms the next one.

    Args:
        alpha: probability that a proposed token is left intact.
        recordings: prompt token ids to the target's continuation.
        seed: of the corruption; the same seed corrupts the same positions of the same prompt
            whatever batch it runs in.
        cost: optional drafter that really runs each round for its cost; its proposals are dropped.
    """

    def __init__(
        self,
        alpha: float,
        recordings: Mapping[Sequence[int], Sequence[int]] | None = None,
        *,
        seed: int = 0,
        cost: Drafter | None = None,
    ) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise UserError(f"alpha must be in [0, 1], got {alpha}")
        self.alpha = alpha
        self.seed = seed
        self.cost = cost
        self.name = "replay" if cost is None else f"replay+{cost.name}"
        self.recordings: dict[Prompt, list[int]] = {
            tuple(prompt): list(output) for prompt, output in (recordings or {}).items()
        }
        self._recording: dict[int, Prompt] = {}  # row -> prompt being recorded

    @property
    def hidden_layers(self) -> tuple[int, ...] | None:
        return None if self.cost is None else self.cost.hidden_layers

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        if self.cost is not None:
            self.cost.bind(runner, sampler, max_gamma)
        # One row more than there are is for padding in graphs.
        B, device = runner.max_batch_size + 1, runner.device
        self._runner, self._vocab_size = runner, sampler.vocab_size
        self._tokens = torch.zeros(B, 0, dtype=torch.int64, device=device)
        self._end = torch.zeros(B, dtype=torch.int64, device=device)  # recorded up to here
        self._seeds = torch.zeros(B, dtype=torch.int64, device=device)
        self._last = [0] * B  # last position written while recording

    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        if self.cost is not None:
            self.cost.admit(rows, token_ids, lengths, hidden)
        admitted = zip(rows.tolist(), token_ids.tolist(), lengths.tolist(), strict=True)
        for row, padded, length in admitted:
            prompt = tuple(padded[:length])
            recorded = self.recordings.get(prompt)
            if recorded is None:
                self._recording[row] = prompt
            sequence = [*prompt, *(recorded or ())]
            self._reserve(len(sequence))
            self._tokens[row, : len(sequence)] = torch.tensor(sequence, device=rows.device)
            self._end[row] = 0 if recorded is None else len(sequence)
            self._seeds[row] = zlib.crc32(array("q", prompt).tobytes(), self.seed & 0xFFFFFFFF)
            self._last[row] = length - 1

    def propose(self, state: StepState, gamma: int) -> Draft:
        if self.cost is not None:
            self.cost.propose(state, gamma)
        self._reserve(max(state.host_lengths) + 1 + gamma)
        graphs = graphs_of(self._runner)
        inputs = [state.rows, state.lengths]
        if graphs is None:
            tokens, lengths = self._proposal(gamma, *inputs)
        else:
            key = "replay", gamma, self.alpha, self.place
            run = partial(self._proposal, gamma)
            tokens, lengths = graphs.call(key, run, inputs, [graphs.spare_row, 0])
        return Draft(tokens, None, lengths)

    def _proposal(self, gamma: int, rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, gamma]`` and how many of them a row of ``lengths`` tokens proposes."""
        step = torch.arange(1, gamma + 1, device=rows.device)
        positions = lengths[:, None] + step  # [B, G]
        recorded, _ = self.recorded(rows, positions)
        noise = position_noise(self._seeds[rows], positions)
        # The noise below alpha decides; above it, it also picks which wrong token to propose.
        spread = ((noise - self.alpha) / max(1.0 - self.alpha, 1e-12)).clamp(0.0, 1.0 - 1e-9)
        shift = 1 + (spread * (self._vocab_size - 1)).long()
        corrupted = (recorded + shift) % self._vocab_size
        remaining = (self._end[rows] - lengths - 1).clamp(0, gamma)
        return torch.where(noise < self.alpha, recorded, corrupted), remaining

    @property
    def place(self) -> tuple[int, int]:
        """Where recordings are, which grow: of what a graph of ``recorded`` reads."""
        return self._tokens.data_ptr(), self._tokens.shape[1]

    def recorded(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Recorded tokens at ``positions`` ``[B, Q]`` of rows ``[B]``, and where there are any."""
        known = positions < self._end[rows][:, None]
        tokens = self._tokens[rows[:, None], positions.clamp(max=self._tokens.shape[1] - 1)]
        return tokens, known

    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        if self.cost is not None:
            self.cost.commit(state_before, verdict, hidden)
        if self._recording.keys().isdisjoint(state_before.host_rows):
            return
        self._reserve(max(state_before.host_lengths) + 2)
        graphs = graphs_of(self._runner)
        inputs = [state_before.rows, state_before.lengths, state_before.current, verdict.tokens]
        if graphs is None:
            self._record(*inputs)
        else:
            graphs.call(("record", self.place), self._record, inputs, [graphs.spare_row, 0, 0, 0])
        for row, length in state_before.rows_and_lengths():
            if row in self._recording:
                self._last[row] = length + 1

    def _record(
        self, rows: Tensor, lengths: Tensor, current: Tensor, emitted: Tensor
    ) -> list[Tensor]:
        """Write ``current [B]`` and the first of ``emitted [B, G + 1]`` where nothing is recorded.

        Rows being recorded draft nothing, so exactly one token is emitted per round.
        """
        unrecorded, following = self._end[rows] == 0, lengths + 1
        for places, tokens in ((following, emitted[:, 0]), (lengths, current)):
            kept = torch.where(unrecorded, tokens, self._tokens[rows, places])
            self._tokens.index_put_((rows, places), kept)
        return []

    def release(self, rows: Sequence[int]) -> None:
        if self.cost is not None:
            self.cost.release(rows)
        for row in rows:
            prompt = self._recording.pop(int(row), None)
            if prompt is not None:
                end = self._last[int(row)] + 1
                self.recordings[prompt] = self._tokens[int(row), len(prompt) : end].tolist()

    def _reserve(self, width: int) -> None:
        have = self._tokens.shape[1]
        if width > have:
            grown = self._tokens.new_zeros(self._tokens.shape[0], max(width, 2 * have, 256))
            grown[:, :have] = self._tokens
            self._tokens = grown
