"""Reading the decoder's settings: draft-length control and the longest row."""

from __future__ import annotations

from typing import Any

from decoder.drafters import Drafter, NoDrafter
from decoder.errors import UserError
from decoder.gamma.auto import AutoGamma
from decoder.gamma.base import AUTO, Controller, FixedGamma
from decoder.model.loading import context_length

_ACCELERATOR_MAX_LENGTH = 4096  # KV is allocated up front there


def make_controller(gamma: Any, max_gamma: int, drafter: Drafter) -> Controller:
    """What decides the draft length: a number, ``"auto"``, or a controller given as such.

    Raises:
        UserError: none of these.
    """
    if isinstance(drafter, NoDrafter):
        return FixedGamma(0)
    if gamma == AUTO:
        return AutoGamma(max_gamma)
    if isinstance(gamma, int) and not isinstance(gamma, bool):
        if gamma < 0:
            raise UserError(f"gamma must be {AUTO!r} or an integer >= 0, got {gamma}")
        return FixedGamma(gamma)
    if hasattr(gamma, "choose") and hasattr(gamma, "observe"):
        return gamma
    raise UserError(f"gamma must be {AUTO!r} or an integer >= 0, got {gamma!r}")


def checked_length(target: Any, max_length: int | None) -> int:
    """The longest prompt plus output, by default the model's context.

    Draft lengths have no part in it: a draft is cut to the room that its row has left.

    Raises:
        UserError: ``max_length`` is not possible with this model.
    """
    limit = context_length(target)
    if max_length is None:
        return limit if target.device.type == "cpu" else min(limit, _ACCELERATOR_MAX_LENGTH)
    if not 2 <= max_length <= limit:
        raise UserError(f"max_length must be in [2, {limit}] for this model, got {max_length}")
    return max_length
