"""Reading the decoder's settings: what runs, draft-length control and the longest row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from decoder.drafters import Drafter, DraftOptions, NoDrafter, build_drafter
from decoder.errors import UserError
from decoder.gamma.auto import AutoGamma
from decoder.gamma.base import AUTO, Controller, FixedGamma
from decoder.model import loading
from decoder.model.kernels import accelerate
from decoder.model.loading import context_length
from decoder.offload import Offload

_ACCELERATOR_MAX_LENGTH = 4096  # KV is allocated up front there


def loaded(
    target: str | Path,
    draft: str | Path | None,
    drafter: str,
    options: DraftOptions,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    experts: str | None,
    offload: Offload | None,
) -> tuple[Any, Drafter, Any]:
    """A target, its drafter and its tokenizer; see ``SpeculativeDecoder.from_paths``."""
    model, tokenizer = loading.load_with_tokenizer(
        target,
        dtype=dtype,
        device=device,
        experts=experts,
        packed=options.kernels,
        offload=offload,
    )
    made = build_drafter(drafter, model, draft, replace(options, tokenizer=tokenizer))
    return model, made, tokenizer


def use_kernels(target: Any, kernels: bool, batch_invariant: bool) -> None:
    """Let ``moesd_kernels`` run what it can of the target, or not.

    Raises:
        UserError: rows are to be independent of the batch, and our kernels are not to run.
    """
    if batch_invariant and not kernels:
        raise UserError("batch_invariant is of moesd's own kernels, which are turned off")
    if kernels:
        accelerate(target, batch_invariant)


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
