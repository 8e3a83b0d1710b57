"""What reading experts came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class OffloadStats:
    """Counts since a run began; an expert is one of a layer, counted once per forward of that.

    Attributes:
        needed: experts that tokens were sent to.
        missed: of those, how many were not in memory, and not on their way either.
        prefetched: experts read on a hint, before a layer asked for them.
        useful: of those, how many it then asked for.
        bytes_read: from where they wait, prefetched ones included.
        wait: seconds that layers waited for reads.
    """

    needed: int = 0
    missed: int = 0
    prefetched: int = 0
    useful: int = 0
    bytes_read: int = 0
    wait: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed experts that no read was made for since the layer ran last."""
        return 1 - (self.missed + self.useful) / self.needed if self.needed else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "experts_needed": self.needed,
            "experts_missed": self.missed,
            "experts_prefetched": self.prefetched,
            "prefetched_useful": self.useful,
            "hit_rate": self.hit_rate,
            "bytes_read": self.bytes_read,
            "wait_seconds": self.wait,
        }

    def line(self) -> str:
        """A few words for the end of a run."""
        rate = "-" if self.hit_rate is None else f"{100 * self.hit_rate:.0f} %"
        ahead = f", {self.useful} of {self.prefetched} prefetched useful" if self.prefetched else ""
        return (
            f"experts: {rate} of {self.needed} in memory, {self.bytes_read / 1e9:.3g} GB read, "
            f"waited {self.wait:.1f} s{ahead}"
        )
