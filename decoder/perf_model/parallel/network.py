"""What a collective costs on a network: the alpha-beta model, latency per message plus bytes.

All collectives start when their last rank arrives; waiting for it is ``busiest``'s matter. One rate
stands for the whole network: NVLink islands joined by slower links are not modelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_EFFICIENCY = 0.9  # of the nominal rate; an assumption


@dataclass(frozen=True, slots=True)
class Network:
    """What joins ranks.

    Args:
        bandwidth: bytes/s that one rank can send while it receives as many.
        latency: seconds until a message without content has arrived, software included.
    """

    name: str
    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"a network's bandwidth must be positive, got {self.bandwidth}")
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"a network's latency must be finite and >= 0, got {self.latency}")

    def all_reduce(self, ranks: int, size: float) -> float:
        """Seconds to sum ``size`` bytes that every rank holds, leaving the sum on all of them.

        Recursive halving and doubling: ``2 ceil(log2 N)`` messages, ``2 (N - 1) / N`` of the bytes.
        Source: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
        MPICH" (2005), section 4.5. A ring sends as many bytes in ``2 (N - 1)`` messages.
        """
        steps = math.ceil(math.log2(ranks))
        return 2 * (steps * self.latency + (ranks - 1) / ranks * size / self.bandwidth)

    def all_gather(self, ranks: int, size: float) -> float:
        """Seconds until every rank has the ``size`` bytes of each of the others.

        A ring, as gloo's: ``N - 1`` messages that wait for each other. Source: as above, 4.1.
        """
        return (ranks - 1) * (self.latency + size / self.bandwidth)

    def all_to_all(self, ranks: int, size: float) -> float:
        """Seconds until the rank that receives most, ``size`` bytes, its own included, has them.

        All messages are in flight at once, as in DeepEP's low-latency kernels: one latency.
        """
        if ranks == 1:
            return 0.0
        return self.latency + (ranks - 1) / ranks * size / self.bandwidth


def _nominal(name: str, gigabytes: float, microseconds: float) -> Network:
    return Network(name, gigabytes * 1e9 * _EFFICIENCY, microseconds * 1e-6)


# Nominal rates per GPU and direction; latencies are of the order that small messages take.
NETWORKS = {
    network.name: network
    for network in (
        _nominal("nvlink", 450, 2),  # fourth generation (H100, H200)
        _nominal("ib-400", 50, 5),  # a 400 Gb/s adapter for each GPU
        _nominal("ib-200", 25, 5),
        _nominal("100gbe", 12.5, 15),
        _nominal("10gbe", 1.25, 30),
    )
}
