"""Experts that do not fit: how many a layer brings, and how long it waits for them.

Follows what ``decoder.offload`` does once it has run for a while, in the mean and under two
assumptions: routing is uniform, and a step's experts are independent of those of the step before.
What a layer used before then says nothing of what it needs now, so that of the experts it needs
the share is in memory that is in memory of all of its own, whichever they are. A test holds this to
the store itself.

- Where places are enough for all that a step uses, layers keep equal parts of them.
- Where they are not, a layer that runs takes places from the one that ran just before it
  (``decoder.offload.residency``): all its experts are there while it computes, and the other
  layers have equal parts of what is left.
- Experts that the next layer used in the step before are read while one computes, as long as nine
  of ten such hints come true: where a step uses nine of ten experts. They need places as well.

Reading joins the time in which weights then pass from memory through the kernels; it does not stand
in for it. A layer first waits for what it misses, then computes while the next one's are read.

Not in it: that work outside layers with experts (drafts, the sampler, the output head) hides reads
ahead too, that reading takes a processor's time, and experts that some tokens prefer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from decoder.offload.policy import WORTH, places_within, room_ahead


class LayerReads(NamedTuple):
    """Experts that are brought for one layer in one forward, on average.

    Attributes:
        missed: while it waits.
        ahead: while the layer before it computes.
    """

    missed: float
    ahead: float


@dataclass(frozen=True, slots=True)
class ExpertReads:
    """The experts of a target, some of them in memory.

    Args:
        counts: experts of each layer that has any.
        expert_bytes: of one expert, the largest where layers differ.
        budget: bytes of memory for experts where they are computed.
        bandwidth: bytes/s at which experts are brought.
        prefetches: whether any are read ahead: from files on a CPU, not from host memory on a GPU.

    Raises:
        UserError: a budget below one layer's experts.
        ValueError: a budget in which all of them fit, or a bandwidth that is not positive.
    """

    counts: tuple[int, ...]
    expert_bytes: float
    budget: float
    bandwidth: float
    prefetches: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(
                f"the bandwidth of reading experts must be positive, got {self.bandwidth}"
            )
        if self.places >= sum(self.counts):
            raise ValueError(
                f"the budget for experts must be below their {self.total_bytes / 1e9:.3g} GB (all "
                f"fit in more, and none is read), got {self.budget / 1e9:.3g} GB"
            )

    @property
    def places(self) -> int:
        """Most experts in memory at once."""
        return places_within(int(self.budget), self.counts, [math.ceil(self.expert_bytes)])

    @property
    def total_bytes(self) -> float:
        """Bytes of all experts."""
        return sum(self.counts) * self.expert_bytes

    def layer_reads(self, active: float, experts: int) -> LayerReads:
        """What is brought for a layer.

        Args:
            active: distinct experts that its tokens are sent to.
            experts: that it has.
        """
        layers, places, share = len(self.counts), self.places, active / experts
        if places >= layers * active:
            return LayerReads(active * max(0.0, 1.0 - places / layers / experts), 0.0)
        ahead = 0.0
        if self.prefetches and share >= WORTH and layers > 2:
            # Of the next layer's; two layers alone keep theirs, and leave no place for others.
            ahead = min(room_ahead(places, active), (layers * active - places) / (layers - 2))
        kept = (places - active - ahead) / (layers - 1)
        return LayerReads(active - (kept + ahead) * share, ahead)

    def layer_bytes(self, active: float, experts: int) -> float:
        """Bytes brought for a layer; arguments as of ``layer_reads``."""
        return sum(self.layer_reads(active, experts)) * self.expert_bytes

    def layer_seconds(self, computing: float, active: float, experts: int) -> float:
        """Seconds of a layer whose own work takes ``computing``; the rest as ``layer_reads``."""
        missed, ahead = self.layer_reads(active, experts)
        one = self.expert_bytes / self.bandwidth
        return missed * one + max(computing, ahead * one)
