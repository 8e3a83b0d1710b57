"""Sums over ranks, and the time they take.

A sum is taken in the order of the ranks on every rank: all hold the same bits, and a row's do not
depend on what else is in the batch. gloo's own ``all_reduce`` adds a number's parts in an order
that depends on its place in the buffer, which from three ranks on a verify would show. Each rank
sends its part to each other one directly: for the small sums of a decode step that is faster, and
when one is gone all of them notice. On GPUs NCCL sums (not run on a GPU yet).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from decoder.errors import RankLost, reason


class Clock:
    """What this rank spent in collectives.

    Attributes:
        seconds: since the process began, waiting for the other ranks included; on a GPU only what
            launching them took.
        calls: how many there were.
    """

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0


clock = Clock()


@contextmanager
def collective() -> Iterator[None]:
    """A block that is one collective, on the clock.

    Raises:
        RankLost: another rank is gone, or did not come within the group's timeout.
    """
    start = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        raise RankLost(reason(error)) from error
    finally:
        clock.seconds += time.perf_counter() - start
        clock.calls += 1


def summed(part: Tensor) -> Tensor:
    """The sum of every rank's ``part``, in its shape and dtype; halves are added in fp32.

    Raises:
        RankLost: as for ``collective``.
    """
    part = part.contiguous()
    if part.device.type != "cpu":
        with collective():
            dist.all_reduce(part)
        return part
    copies = part.expand(dist.get_world_size(), *part.shape).contiguous()
    parts = torch.empty_like(copies)
    with collective():
        dist.all_to_all_single(parts, copies)
    exact = part.dtype if part.dtype.itemsize > 2 else torch.float32
    total = parts[0].to(exact)
    for other in parts[1:]:
        total = total + other
    return total.to(part.dtype)
