"""A link to memory that is not the machine's own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """Offloaded experts: a documented extension, not validated by measurement.

    Args:
        bandwidth: bytes/s over the link.
        remote_share: share of active experts that must come over it, 1 - cache hit rate.
    """

    bandwidth: float
    remote_share: float
