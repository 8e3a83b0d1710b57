"""A plan as the value of vLLM's ``--speculative-config``: draft tokens per batch size.

vLLM 0.32 (``v1/spec_decode/dynamic/utils.py``) reads ``num_speculative_tokens_per_batch_size`` as a
list of ``[first batch, last batch, tokens]``, ends included, from batch size 1 on and without
overlaps; larger batches keep the last entry's tokens. 0 tokens is plain decoding at those sizes (a
draft model still takes in each step's tokens there), while ``num_speculative_tokens``, which bounds
the table, must be positive.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoder.checkpoint.folder import could_be_hub_name
from decoder.cli.streams import say
from decoder.errors import UserError

if TYPE_CHECKING:
    from decoder.perf_model.planning.planner import Plan


def speculative_config(plan: Plan, draft: str | None) -> dict[str, Any]:
    """The best draft length per batch size, 0 where speculation gains less than 2 %.

    A batch size that was not asked for takes the length of the next smaller one that was; those
    below the smallest take the smallest's.

    Args:
        draft: what ``--draft`` names; said to vLLM where it is something that vLLM could load.

    Raises:
        UserError: speculation pays nowhere, for which vLLM has no speculative config.
    """
    gammas = [entry.best.gamma if entry.pays else 0 for entry in plan.batches]
    if not any(gammas):
        sizes = ", ".join(str(entry.batch) for entry in plan.batches)
        raise UserError(
            f"expected a batch size at which speculation gains 2 % or more, got none of {sizes}: "
            "vLLM is to run without --speculative-config"
        )
    return {
        **_drafting(draft),
        "num_speculative_tokens": max(gammas),
        "num_speculative_tokens_per_batch_size": _ranges(
            [entry.batch for entry in plan.batches], gammas
        ),
    }


def _ranges(batches: list[int], gammas: list[int]) -> list[list[int]]:
    """``[first, last, gamma]`` of neighbouring batch sizes with one draft length."""
    table: list[list[int]] = []
    lasts = [batch - 1 for batch in batches[1:]] + batches[-1:]
    for last, gamma in zip(lasts, gammas, strict=True):
        if table and table[-1][2] == gamma:
            table[-1][1] = last
        else:
            table.append([table[-1][1] + 1 if table else 1, last, gamma])
    return table


def _drafting(draft: str | None) -> dict[str, str]:
    if draft == "none":
        return {"method": "ngram"}
    if draft is not None and (Path(draft).is_dir() or could_be_hub_name(draft)):
        return {"model": draft}
    say('note: this draft has no name that vLLM could load: add "model" (or "method") to it')
    return {}
