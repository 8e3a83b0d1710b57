"""What rank 0 tells the others: one message before each thing that all of them do.

Messages are int64 and travel over gloo, between the memories of hosts, also where models are on
GPUs. Those of decoding fit into one broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import collective

_FRONT = 1024  # numbers of the first broadcast
_NONE = -(2**62)  # for None; layers may count from the last, -1

END, OPEN, CLOSE, SCRUB, RUN = range(5)


class Command(NamedTuple):
    """Attributes: ``kind``, one of those above; ``runner``, of those that rank 0 opened;
    ``numbers`` (int or ``None``) and ``tensors`` (int64 or ``None``), as the kind has them."""

    kind: int
    runner: int = 0
    numbers: Sequence[Any] = ()
    tensors: Sequence[Any] = ()


class Channel:
    """From rank 0 to all others.

    Args:
        group: a gloo group of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._front = torch.zeros(_FRONT, dtype=torch.int64)

    def send(self, command: Command) -> None:
        """Tell the other ranks; they have not begun when this returns."""
        flat = _tensor(_described(command))
        values = [t.reshape(-1).to("cpu", torch.int64) for t in command.tensors if t is not None]
        body = torch.cat([flat, *values])
        self._front[0] = len(body)
        self._front[1 : 1 + len(body)] = body[: _FRONT - 1]
        self._pass(self._front)
        if len(body) > _FRONT - 1:
            self._pass(body[_FRONT - 1 :].contiguous())

    def receive(self) -> Command:
        """Wait for what rank 0 has to say."""
        self._pass(self._front)
        length = int(self._front[0])
        body = self._front[1 : 1 + length].clone()
        if length > _FRONT - 1:
            rest = torch.empty(length - (_FRONT - 1), dtype=torch.int64)
            self._pass(rest)
            body = torch.cat([body, rest])
        return _read(body)

    def _pass(self, numbers: Tensor) -> None:
        """Rank 0's numbers to every rank."""
        with collective():
            dist.broadcast(numbers, 0, self._group)


def _described(command: Command) -> list[int]:
    """Kind, runner, numbers and the shapes of the tensors, each list after its length."""
    head = [command.kind, command.runner, len(command.numbers), len(command.tensors)]
    head += [_NONE if number is None else number for number in command.numbers]
    for tensor in command.tensors:
        head += [_NONE] if tensor is None else [tensor.dim(), *tensor.shape]
    return head


def _read(body: Tensor) -> Command:
    values = iter(body.tolist())
    take = lambda count: [next(values) for _ in range(count)]
    kind, runner, count, of_tensors = take(4)
    numbers = [None if number == _NONE else number for number in take(count)]
    shapes = []
    for _ in range(of_tensors):
        dims = next(values)
        shapes.append(None if dims == _NONE else take(dims))
    tensors = [
        None if shape is None else _tensor(take(math.prod(shape))).view(shape) for shape in shapes
    ]
    return Command(kind, runner, numbers, tensors)


def _tensor(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
