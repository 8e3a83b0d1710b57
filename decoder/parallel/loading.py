"""A target divided among ranks, loaded: each reads its own part of the files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from decoder.model.kernels import accelerate, cpu_isa
from decoder.model.loading import load_model

from .group import Ranks
from .mode import Mode
from .plan import distributed_config
from .shards import unwrap_experts, unwrap_tensors


def load_part(
    path: str | Path,
    mode: Mode,
    ranks: Ranks,
    *,
    dtype: str | torch.dtype = "auto",
    experts: str | None = None,
    kernels: bool = True,
) -> Any:
    """This rank's part of a target; every rank has to call it.

    Args:
        path, dtype, experts: as for ``decoder.model.loading.load_model``.
        mode: ``"expert"`` or ``"tensor"``, see ``plan.distributed_config``.
        ranks: of the run. On rank 0 the result is for ``runner.lead``, on the others for
            ``worker.serve``.
        kernels: let ``moesd_kernels`` run what it can of the part.

    Raises:
        UserError: the model cannot be divided so, or the ranks differ in what they run.
        RankLost: a rank ended while the others were loading.
    """
    ranks.require_same(
        {
            "version of torch": torch.__version__,
            "version of transformers": transformers.__version__,
            "instruction set": cpu_isa(),  # of other kernels, rows have other bits
        }
    )
    divide = partial(distributed_config, mode=mode, size=ranks.size)
    with ranks.together():
        model = load_model(path, dtype=dtype, device=ranks.device, experts=experts, divide=divide)
    ranks.wait_for_all()
    with ranks.together():
        if mode == "expert":
            unwrap_experts(model, ranks.rank)
        else:
            unwrap_tensors(model, model.tp_plan, ranks.rank)
        model.to(ranks.device)
        if kernels:
            accelerate(model)
    ranks.wait_for_all()
    return model
