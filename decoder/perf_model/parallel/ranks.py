"""Experts spread over ranks: what each holds, how much of a step it gets, what is exchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .busiest import busiest_active, busiest_rows
from .network import Network

Exchange = Literal["all-reduce", "all-gather", "all-to-all"]
EXCHANGES: tuple[Exchange, ...] = ("all-reduce", "all-gather", "all-to-all")
MAX_RANKS = 65536


@dataclass(frozen=True, slots=True)
class Ranks:
    """A group of ranks, each with its share of every MoE layer's experts and all other weights.

    Nothing overlaps: a layer's collectives are added to its arithmetic, where engines that run two
    halves of a batch in turn hide a part of them.

    Args:
        count: of ranks; 1 is no parallelism, and changes nothing.
        exchange: ``"all-reduce"``: every rank computes attention for the whole batch, runs its own
            experts on it, and the outputs are summed (attention replicated: transformers' way, and
            ``generate --parallel expert`` on GPUs). ``"all-gather"``: the same, but every rank gets
            all the others' outputs and sums them in order (``--parallel expert`` on CPUs, so that
            all ranks hold the same bits). ``"all-to-all"``: sequences are divided among the ranks
            (attention data-parallel), and rows travel to their experts and back, a copy for each of
            a token's experts (as in DeepEP's low-latency kernels).
    """

    count: int
    network: Network
    exchange: Exchange = "all-reduce"

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_RANKS:
            raise ValueError(f"ranks must be in [1, {MAX_RANKS}], got {self.count}")
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {EXCHANGES}, got {self.exchange!r}")

    def check_experts(self, num_experts: int) -> None:
        """Refuse ranks that would have nothing to do.

        Raises:
            ValueError: more ranks than experts.
        """
        if self.count > num_experts:
            raise ValueError(
                f"ranks must be at most the {num_experts} experts of a layer, got {self.count}"
            )

    def local(self, sequences: int) -> int:
        """Sequences on the rank with most of them."""
        return math.ceil(sequences / self.count) if self.exchange == "all-to-all" else sequences

    def held(self, num_experts: int) -> int:
        """Experts of a layer on the rank with most of them."""
        return math.ceil(num_experts / self.count)

    def busiest(
        self, active: float, rows: float, alike: float, num_experts: int
    ) -> tuple[float, float]:
        """The largest loads that a rank is expected to have, of two that it may not have at once.

        Args:
            active, rows: distinct experts and routed rows of the whole layer.
            alike: see ``busiest_rows``.

        Returns:
            distinct experts, and routed rows.
        """
        if self.count == 1:
            return active, rows
        return (
            busiest_active(active, num_experts, self.count),
            busiest_rows(rows, alike, self.count),
        )

    def collective_seconds(self, tokens: int, rows: float, hidden: int, size: float) -> float:
        """Seconds of one MoE layer's collectives.

        Args:
            tokens: of the whole batch.
            rows: routed rows of the busiest rank.
            hidden: width of a row.
            size: bytes of one of its elements.
        """
        if self.exchange == "all-reduce":
            return self.network.all_reduce(self.count, tokens * hidden * size)
        if self.exchange == "all-gather":
            return self.network.all_gather(self.count, tokens * hidden * size)
        return 2 * self.network.all_to_all(self.count, rows * hidden * size)
