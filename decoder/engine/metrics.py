"""Counts and clocks of a run, and the ratios that MoESD reasons with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoder.offload import OffloadStats, store_of

_REMEMBERED = 256.0  # finished outputs whose lengths say what the next will be like
PHASES = ("prefill", "draft", "verify", "sample", "host")


@dataclass(slots=True)
class DecoderStats:
    """What the steps did since the decoder was made, or the last ``generate`` or ``stream`` began.

    Attributes:
        sequences: finished sequences.
        tokens: tokens in outputs.
        rounds: verify forwards.
        row_rounds: rows summed over rounds.
        drafted, accepted: over all rows; accepted ones may lie past the end of an output.
        seconds: phase to seconds; ``"host"`` is what the loop itself costs.
        wall: seconds spent in steps.
        offload: what reading experts came to, where they do not all stay in memory.
    """

    sequences: int = 0
    tokens: int = 0
    rounds: int = 0
    row_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    wall: float = 0.0
    offload: OffloadStats | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _verified: int = 0
    _reached: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _passed: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _forwards: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    _emitted_speculating: int = 0
    # Of late, for expectations: a server's outputs need not be like those of another day.
    _late_sequences: float = 0.0
    _late_rows: float = 0.0
    _late_emitted: float = 0.0

    @classmethod
    def begun(cls, target: Any) -> DecoderStats:
        """Counts of a run on this model that starts now."""
        store = store_of(target)
        return cls(offload=None if store is None else store.begin())

    def output_to_expect(self, most: float) -> float:
        """Tokens to expect of an output that has ``most`` at most.

        All tokens of late by finished outputs. Of those that run together the short ones finish
        first, and a mean of finished ones alone would be theirs.
        """
        finished = self._late_sequences
        return min(1 + self._late_emitted / finished, most) if finished else most

    def mean_rounds(self, otherwise: float) -> float:
        """Mean rounds of an output of late; ``otherwise`` before the first has finished."""
        return self._late_rows / self._late_sequences if self._late_sequences else otherwise

    def observe(
        self,
        gamma: int,
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds: Mapping[str, float],
    ) -> None:
        """Add one round of ``len(drafted)`` rows."""
        rows = len(drafted)
        self.rounds += 1
        self.row_rounds += rows
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        self._late_rows += rows
        self._late_emitted += rows + sum(accepted)
        for phase, value in seconds.items():
            self.seconds[phase] += value
        count, total = self._forwards.get((rows, gamma), (0, 0.0))
        self._forwards[rows, gamma] = count + 1, total + seconds["verify"]
        if gamma == 0:
            return
        self._verified += rows * (gamma + 1)
        self._emitted_speculating += sum(accepted) + rows
        for length, kept in zip(drafted, accepted, strict=True):
            for position in range(min(kept + 1, length)):
                self._reached[position] += 1
                self._passed[position] += position < kept

    def end(self, lengths: Sequence[int]) -> None:
        """Add finished outputs of so many tokens."""
        self.sequences += len(lengths)
        self.tokens += sum(lengths)
        finished = self._late_sequences + len(lengths)
        keep = min(1.0, _REMEMBERED / finished) if finished else 1.0
        self._late_sequences = keep * finished
        self._late_rows *= keep
        self._late_emitted *= keep

    @property
    def decided(self) -> int:
        """Drafts accepted or rejected; what stands behind a rejected one is neither."""
        return sum(self._reached.values())

    @property
    def alpha(self) -> float | None:
        """Acceptance rate: accepted drafts over drafts that were decided on."""
        return sum(self._passed.values()) / self.decided if self.decided else None

    @property
    def alpha_by_position(self) -> list[float]:
        """Acceptance rate of the j-th draft, given that those before it were accepted."""
        return [self._passed[j] / self._reached[j] for j in sorted(self._reached)]

    @property
    def sigma(self) -> float | None:
        """Emitted tokens over (row rounds * (gamma + 1)), of the rounds that speculated (Eq. 5)."""
        return self._emitted_speculating / self._verified if self._verified else None

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens emitted per row and round."""
        return (self.accepted + self.row_rounds) / self.row_rounds if self.row_rounds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens over wall time, prefill included."""
        return self.tokens / self.wall if self.wall else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Output tokens but the first, which are of prefill, over the time of the rounds alone."""
        seconds = sum(value for phase, value in self.seconds.items() if phase != "prefill")
        return (self.tokens - self.sequences) / seconds if seconds else None

    def forward_ms(self, batch: int, gamma: int) -> float | None:
        """Mean milliseconds of a target forward of ``batch * (gamma + 1)`` tokens."""
        count, total = self._forwards.get((batch, gamma), (0, 0.0))
        return 1e3 * total / count if count else None

    def target_efficiency(self, plain: DecoderStats | None = None) -> float | None:
        """T_target(B, 1) / T_target(B, gamma), over the batch sizes that both runs have seen.

        Args:
            plain: stats of an autoregressive run; by default this run's own rounds at gamma 0.
        """
        plain = self if plain is None else plain
        numerator = denominator = 0.0
        for (batch, gamma), (count, total) in self._forwards.items():
            single = plain.forward_ms(batch, 0)
            if gamma > 0 and single is not None:
                numerator += count * single / 1e3
                denominator += total
        return numerator / denominator if denominator else None

    def ms_per_round(self) -> dict[str, float]:
        """Phase to mean milliseconds per round; prefill is not part of a round."""
        phases = (phase for phase in PHASES if phase != "prefill")
        return {phase: 1e3 * self.seconds[phase] / max(self.rounds, 1) for phase in phases}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "alpha": self.alpha,
            "alpha_by_position": self.alpha_by_position,
            "sigma": self.sigma,
            "acceptance_length": self.acceptance_length,
            "target_efficiency": self.target_efficiency(),
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "wall_seconds": self.wall,
            "prefill_seconds": self.seconds["prefill"],
            "ms_per_round": self.ms_per_round(),
            "offload": self.offload and self.offload.as_dict(),
        }
