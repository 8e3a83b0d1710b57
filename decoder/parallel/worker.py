"""What every rank but 0 does: hold its part of the target, and run what rank 0 announces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from decoder.drafters.self_draft import ReducedRouting, find_experts
from decoder.model.kernels import ATTENTION

from .commands import CLOSE, END, OPEN, SCRUB, Channel, Command
from .group import Ranks
from .runner import FollowingRunner


def serve(model: Any, ranks: Ranks) -> None:
    """Run forwards until rank 0 ends.

    Args:
        model: this rank's part of the target.
        ranks: this one's view of the run.

    Raises:
        RankLost: this rank failed, or another is gone.
    """
    channel = Channel(ranks.commands)
    runners: dict[int, FollowingRunner] = {}
    while True:
        with ranks.together():
            command = channel.receive()
            if command.kind == END:
                return
            _do(command, model, runners)


def _do(command: Command, model: Any, runners: dict[int, FollowingRunner]) -> None:
    if command.kind == CLOSE:
        del runners[command.runner]
        return
    if command.kind == OPEN:
        batch, length, attention = command.numbers
        kernel: Any = ATTENTION[attention or 0]
        runners[command.runner] = FollowingRunner(model, batch, length, kernel, static=False)
        return
    runner = runners[command.runner]
    if command.kind == SCRUB:
        row, start = command.numbers
        runner.cache.scrub(row, start)
        return
    reduced: AbstractContextManager[None] = nullcontext()
    if (most_experts := command.numbers[1]) is not None:
        reduced = ReducedRouting(find_experts(model), most_experts)()
    with reduced, torch.inference_mode():
        runner.follow(command)
