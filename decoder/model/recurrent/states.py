"""What layers with a recurrent state keep of each row: one state, and rings of their newest inputs.

A layer is a short convolution, whose ring holds the inputs that its window and its undecided tokens
reach back to, and mostly a recurrence behind it, whose ring holds what it needs to take in its
undecided tokens again. A ring's place is a position modulo its length, so nothing is moved when
tokens are accepted: the next forward begins at another position, and that is the whole rollback.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .placing import Placing

# ``(inputs, states, rows, keep, counts) -> outputs``
Operator = Callable[[list[Tensor], Tensor, Tensor, Tensor, Tensor], Tensor]

_active = threading.local()


class RecurrentStates:
    """The recurrent layers of a model's cache, in the order in which its forward meets them.

    Args:
        num_rows: cache rows.
        undecided: most tokens of a row that may yet be taken back: a draft and the one before it.
        operators: of ``moesd_kernels.dense.recurrent``.
        device: of the model.
    """

    def __init__(self, num_rows: int, undecided: int, operators: Any, device: torch.device) -> None:
        self.undecided, self.operators = undecided, operators
        self.layers: dict[tuple[int, int], RecurrentLayer] = {}
        # How far each row's state and ring are. Layers share the tensor, which is replaced and
        # never written to, and so share what follows from it, unless a forward ends between two.
        self._progress = torch.zeros(2, num_rows, dtype=torch.int64, device=device)
        self._placing: Placing | None = None
        self._layer: RecurrentLayer | None = None

    @contextmanager
    def running(self, rows: Tensor, positions: Tensor, settled: Tensor | None) -> Iterator[None]:
        """A forward of this thread inside computes these tokens: see ``Placing``."""
        previous = getattr(_active, "states", None)
        self._placing, self._layer, _active.states = Placing(rows, positions, settled), None, self
        try:
            yield
        finally:
            self._placing, self._layer, _active.states = None, None, previous

    def enter(self, layer_idx: int, state_idx: int) -> None:
        """What comes next is of this layer, of its convolution of that number."""
        key = layer_idx, state_idx
        if key not in self.layers:
            self.layers[key] = RecurrentLayer(self._progress, self.undecided)
        self._layer = self.layers[key]
        self._layer.calls = 0

    def layer(self) -> tuple[RecurrentLayer, Placing]:
        """The layer that was entered last, and the tokens of the forward.

        Raises:
            NotImplementedError: there is none.
        """
        if self._layer is None or self._placing is None:
            raise NotImplementedError("a recurrence that no convolution of the cache precedes")
        return self._layer, self._placing

    def scrub(self, row: int | slice, start: int = 0) -> None:
        """Forget a row from position ``start`` on.

        What waits in rings is read only where a later forward has written it; a state is of settled
        tokens, and stays unless all are forgotten.
        """
        if start == 0:
            for layer in self.layers.values():
                for recurrence in layer.recurrences:
                    recurrence.states[row] = 0

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.tensors())


def active() -> RecurrentStates | None:
    """The states of the forward that this thread is in."""
    return getattr(_active, "states", None)


class Ring:
    """One tensor per token, at its position modulo ``length``; made for the first that it is given.

    Args:
        num_rows: cache rows.
        length: places of each.
    """

    def __init__(self, num_rows: int, length: int) -> None:
        self._rows, self.length = num_rows, length
        self.slab: Tensor | None = None  # [rows * length, ...]

    def of(self, inputs: Tensor) -> Tensor:
        """``[rows * length, ...]`` for inputs ``[B, Q, ...]``."""
        if self.slab is None:
            self.slab = inputs.new_zeros(self._rows * self.length, *inputs.shape[2:])
        return self.slab


class RecurrentLayer:
    """One layer's convolution and what follows it.

    Args:
        progress: ``[2, rows]`` int64 zeros, see ``Recurrence``.
        undecided: most tokens of a row that may yet be taken back.

    Attributes:
        calls: of recurrences since the layer was entered; Zamba has one for each of its heads.
    """

    def __init__(self, progress: Tensor, undecided: int) -> None:
        self.recurrences: list[Recurrence] = []
        self.calls = 0
        self._progress, self._undecided = progress, undecided
        self._rows = progress.shape[1]
        self._window: Ring | None = None

    def window(self, inputs: Tensor, width: int, placing: Placing) -> Tensor:
        """Inputs ``[B, Q, C]`` behind the ``width - 1`` before them, which are kept for later.

        Returns:
            ``[B, width - 1 + Q, C]``.
        """
        if self._window is None:
            self._window = Ring(self._rows, width - 1 + self._undecided)
        ring, length = self._window.of(inputs), self._window.length
        window = torch.cat([placing.before(ring, width - 1, length), inputs], dim=1)
        placing.write(ring, inputs, length)
        return window

    def recur(
        self, operator: Operator, inputs: list[Tensor], shape: tuple[int, ...], placing: Placing
    ) -> Tensor:
        """Outputs ``[B, Q, ...]`` of a recurrence for inputs ``[B, Q, ...]``.

        Args:
            operator: computes them, and moves the states.
            shape: of one row's state.
        """
        if self.calls == len(self.recurrences):
            dtype = torch.promote_types(inputs[0].dtype, torch.float32)
            states = inputs[0].new_zeros(self._rows, *shape, dtype=dtype)
            rings = [Ring(self._rows, self._undecided) for _ in inputs]
            self.recurrences.append(Recurrence(states, rings, self._progress))
        recurrence = self.recurrences[self.calls]
        self.calls += 1
        return recurrence(operator, inputs, placing)

    def tensors(self) -> Iterator[Tensor]:
        """All that the layer holds."""
        rings = [self._window, *(ring for each in self.recurrences for ring in each.rings)]
        yield from (ring.slab for ring in rings if ring is not None and ring.slab is not None)
        yield from (recurrence.states for recurrence in self.recurrences)


class Recurrence:
    """One state per row, and the inputs it has not taken in for good.

    Args:
        states: ``[rows, ...]`` fp32.
        rings: one for each input.
        progress: ``[2, rows]`` int64: tokens that each state has taken in, and that it or its ring
            has been given.
    """

    def __init__(self, states: Tensor, rings: list[Ring], progress: Tensor) -> None:
        self.states, self.rings, self.progress = states, rings, progress

    def __call__(self, operator: Operator, inputs: list[Tensor], placing: Placing) -> Tensor:
        length = self.rings[0].length
        replay = placing.replay(self.progress, length)
        slabs = [ring.of(x) for ring, x in zip(self.rings, inputs, strict=True)]
        whole = [replay.sequence(slab, x) for slab, x in zip(slabs, inputs, strict=True)]
        if len(replay.restarted):
            self.states.index_fill_(0, replay.restarted, 0)
        outputs = operator(whole, self.states, replay.rows, replay.keep, replay.counts)
        self.progress = replay.after
        for slab, x in zip(slabs, inputs, strict=True):
            placing.write(slab, x, length)
        return replay.own(outputs)
