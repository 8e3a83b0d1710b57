"""The gated RMS norm behind a recurrence in PyTorch: the definition of the compiled ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    w: Tensor,
    eps: float,
    group: int,
    gate_first: bool,
    cast_first: bool,
    activation: str,
) -> Tensor:
    """An RMS norm of each group of x, times the weight and an activation of the gate.

    Arguments and result are those of ``ops.gated_rms_norm``, already checked. Computes in fp32, or
    in fp64 of fp64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    opened = F.silu(gate.to(wide)) if activation == "silu" else gate.to(wide).sigmoid()
    values = x.to(wide) * opened if gate_first else x.to(wide)
    groups = values.unflatten(-1, (-1, group))
    normed = groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt()
    weight = w.to(wide).view(-1, group)  # of all groups, or of each
    if cast_first:
        normed = (weight * normed.to(x.dtype).to(wide)).to(x.dtype).to(wide)
    else:
        normed = weight * normed
    normed = normed.flatten(-2)
    return (normed if gate_first else normed * opened).to(x.dtype)
