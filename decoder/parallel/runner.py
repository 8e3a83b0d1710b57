"""The target's runner on rank 0, which tells the other ranks what it is about to run."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from decoder.errors import RankLost, UserError
from decoder.model.cache import RaggedCache
from decoder.model.kernels import ATTENTION, AttentionName
from decoder.model.rope import row_rope
from decoder.model.runner import ModelRunner
from decoder.model.support import check_supported

from .commands import CLOSE, END, OPEN, RUN, SCRUB, Channel, Command
from .group import Ranks

_leaders: weakref.WeakKeyDictionary[torch.nn.Module, Leader] = weakref.WeakKeyDictionary()


def target_runner(model: Any, *arguments: Any, **options: Any) -> ModelRunner:
    """The runner of a target: for one of several ranks where ``lead`` has been told so."""
    kind = RankedRunner if model in _leaders else ModelRunner
    return kind(model, *arguments, **options)


def lead(model: torch.nn.Module, ranks: Ranks) -> Leader:
    """Have rank 0's runners of ``model`` lead the other ranks, which must ``serve`` it; once."""
    leader = _leaders[model] = Leader(ranks)
    return leader


class Leader:
    """What rank 0 tells the others on behalf of the runners of one model.

    Args:
        ranks: this must be rank 0.

    Attributes:
        ranks: as given.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._channel = Channel(ranks.commands)
        self._opened = 0
        self._dropped: list[int] = []
        atexit.register(self.end)

    def open(self, runner: ModelRunner, *numbers: int) -> int:
        """Have a runner made on the other ranks, and those forgotten that are gone here.

        Inside of what all ranks do together: they try it at once, as this one has to.
        """
        # Not when the collector finds them: that may be in the middle of another message.
        while self._dropped:
            self.tell(Command(CLOSE, self._dropped.pop()))
        self._opened += 1
        weakref.finalize(runner, self._dropped.append, self._opened)
        self.tell(Command(OPEN, self._opened, numbers))
        return self._opened

    def send(self, command: Command) -> None:
        """Tell the other ranks.

        Raises:
            RankLost: one of them is gone.
        """
        with self.ranks.together():
            self.tell(command)

    def tell(self, command: Command) -> None:
        """The same inside of what all ranks do together."""
        self._channel.send(command)

    def scrub(self, runner: int, cache: RaggedCache, row: int, start: int = 0) -> None:
        """``RaggedCache.scrub`` on every rank, in the cache of one runner."""
        self.send(Command(SCRUB, runner, (row, start)))
        RaggedCache.scrub(cache, row, start)

    def end(self) -> None:
        """Let the other ranks go; they lose this one where it was stopped in a forward."""
        atexit.unregister(self.end)
        if not self.ranks.is_inside:
            with suppress(RankLost):
                self.send(Command(END))


class RankedRunner(ModelRunner):
    """A ``ModelRunner`` each of whose forwards runs on every rank.

    Steps are not captured in graphs. Arguments as for ``ModelRunner``.

    Raises:
        UserError: as there, or the rotary embedding depends on a row's length.
        RankLost: another rank is gone, from every method that runs the model.
    """

    def __init__(
        self,
        model: Any,
        max_batch_size: int,
        max_length: int,
        attention: AttentionName = "auto",
        static: bool | Literal["auto"] = "auto",
        longest_draft: int = 0,
    ) -> None:
        if static is True:
            raise UserError("static steps are of one process; expected static=False over ranks")
        if check_supported(model):
            raise UserError(
                f"{type(model).__name__} has layers with recurrent state, which run in one process "
                "only; expected attention in every layer over several ranks"
            )
        device = model.get_input_embeddings().weight.device
        if row_rope(model, max_batch_size, max_length, device) is not None:
            raise UserError(
                f"the rotary embedding of {type(model).__name__} depends on a row's length; over "
                "several ranks, expected one that depends on the position alone"
            )
        self._leader = _leaders[model]
        place = ATTENTION.index(attention)
        with self._leader.ranks.together():
            self._number = self._leader.open(self, max_batch_size, max_length, place)
            super().__init__(model, max_batch_size, max_length, attention, False, longest_draft)
        # Whoever has met undefined numbers has the cache scrub their row. Weakly: no circle.
        scrub = partial(self._leader.scrub, self._number, weakref.proxy(self.cache))
        self.cache.scrub = scrub  # type: ignore[method-assign]

    def run(
        self,
        input_ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        length: int,
        hidden_layers: Sequence[int] | None = None,
        logits_positions: Tensor | None = None,
        most_experts: int | None = None,
        settled: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As in ``ModelRunner``, on every rank; ``settled`` is of models that are refused."""
        layers = None if hidden_layers is None else torch.tensor(list(hidden_layers))
        reserved = min(self.cache.row_length - 1, self.max_length)
        numbers = length, most_experts, reserved, int(self._lean is not None)
        tensors = input_ids, rows, positions, layers, logits_positions
        with self._leader.ranks.together():
            self._leader.tell(Command(RUN, self._number, numbers, tensors))
            return super().run(
                input_ids, rows, positions, length, hidden_layers, logits_positions, most_experts
            )


class FollowingRunner(ModelRunner):
    """A ``ModelRunner`` of another rank, which runs what rank 0 has announced."""

    def follow(self, command: Command) -> None:
        """Run a forward; nobody here looks at its logits."""
        length, most_experts, reserved, walks = command.numbers
        tensors: list[Any] = [
            tensor if tensor is None else tensor.to(self.device) for tensor in command.tensors
        ]
        ids, rows, positions, layers, columns = tensors
        self.cache.reserve(reserved)
        lean = self._lean
        if walks and lean is None:
            raise RuntimeError("the layers are walked on rank 0 and not here")
        if not walks:  # for a hook on rank 0; where columns are cut, parts have other shapes
            self._lean = None
        try:
            wanted = None if layers is None else layers.tolist()
            self.run(ids, rows, positions, length, wanted, columns, most_experts)
        finally:
            self._lean = lean
