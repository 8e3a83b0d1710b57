"""Static-shape steps, captured as CUDA graphs per (batch bucket, queries, view).

A decode step on a GPU is launch-bound: hundreds of small kernels that Python cannot issue fast
enough. Here a forward, or whatever else a round does to its rows, runs on buffers of fixed size,
rows padded to a bucket, so that it can be captured once and replayed. The same code runs without
capture on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from .capture import CapturedCalls

Outputs = tuple[Tensor, Tensor | None]
StaticForward = Callable[..., Outputs]

_MIN_VIEW = 256


class StepGraphs:
    """Runs steps through fixed buffers, captured where ``capture`` says so.

    Args:
        max_batch_size: largest batch.
        max_view: positions of a cache row, a multiple of 64.
        capture: replay CUDA graphs; otherwise call the functions on padded buffers each time.
        insist: on graphs of every step (``CapturedCalls``).

    Attributes:
        spare_row: the row of padding in tables of the rows, which have it for this alone.
    """

    def __init__(
        self, max_batch_size: int, max_view: int, capture: bool, insist: bool = True
    ) -> None:
        self.spare_row = max_batch_size
        self._max_view = max_view
        self._calls = CapturedCalls(capture, insist)

    def __len__(self) -> int:
        return len(self._calls)

    def clear(self) -> None:
        """Drop every graph: what was captured is no longer what steps do."""
        self._calls.clear()

    def call(
        self,
        key: Hashable,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        padding: Sequence[int],
    ) -> list[Tensor]:
        """What ``function`` makes of ``inputs``, in a bucket of rows: see ``CapturedCalls``."""
        return self._calls(key, function, inputs, self.bucket(inputs[0].shape[0]), padding)

    def forward(
        self,
        forward: StaticForward,
        input_ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        length: int,
        hidden_layers: Sequence[int] | None = None,
        logits_positions: Tensor | None = None,
    ) -> Outputs:
        """The forward of ``[B, Q]`` tokens.

        Args:
            forward: ``(input_ids, rows, positions, view, hidden_layers, logits_positions)`` to
                ``(logits, hidden or None)``.
            length: positions that some query may see.

        Returns:
            Static logits, valid until the next call, and a copy of the hidden states, which a
            drafter may keep for a round.
        """
        layers = None if hidden_layers is None else tuple(hidden_layers)
        view = self.view(length)

        def run(ids: Tensor, rows: Tensor, positions: Tensor, *columns: Tensor) -> list[Tensor]:
            found = forward(ids, rows, positions, view, layers, columns[0] if columns else None)
            return [x for x in found if x is not None]

        inputs, padding = [input_ids, rows, positions], [0, self.spare_row, -1]
        if logits_positions is not None:
            inputs, padding = [*inputs, logits_positions], [*padding, 0]
        logits, *hidden = self.call(("forward", view, layers), run, inputs, padding)
        return logits, hidden[0].clone() if hidden else None

    def bucket(self, batch: int) -> int:
        """Rows computed for ``batch`` live ones: powers of two up to 8, then multiples of 8."""
        size = 1
        while size < batch and size < 8:
            size *= 2
        if batch > size:
            size = -(-batch // 8) * 8
        return min(size, self.spare_row)

    def view(self, length: int) -> int:
        """Positions looked at: powers of two from 256."""
        view = _MIN_VIEW
        while view < length:
            view *= 2
        return min(view, self._max_view)
