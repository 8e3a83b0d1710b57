"""transformers' gated RMS norms, one of each way in which they are written."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

EPS = 1e-5
# The module of width 40, and the rule that it follows.
GATED_NORMS = {
    "qwen3_next": (
        lambda: Qwen3NextRMSNormGated(40, eps=EPS),
        {"group": 40, "gate_first": False, "cast_first": True, "activation": "silu"},
    ),
    "kimi_linear": (
        lambda: KimiLinearRMSNormGated(40, eps=EPS),
        {"group": 40, "gate_first": False, "cast_first": False, "activation": "sigmoid"},
    ),
    "zamba2": (
        lambda: Zamba2RMSNormGated(40, 20, eps=EPS),
        {"group": 20, "gate_first": True, "cast_first": True, "activation": "silu"},
    ),
    "falcon_h1": (
        lambda: FalconH1RMSNormGated(40, eps=EPS, n_groups=4),
        {"group": 10, "gate_first": False, "cast_first": False, "activation": "silu"},
    ),
    "falcon_h1, gate first": (
        lambda: FalconH1RMSNormGated(40, eps=EPS, n_groups=2, norm_before_gate=False),
        {"group": 20, "gate_first": True, "cast_first": False, "activation": "silu"},
    ),
}


def gated_norm(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A module of random weight, and rows and gates ``[2, 3, 40]`` for it."""
    g = torch.Generator().manual_seed(0)
    module = GATED_NORMS[name][0]().to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(40, generator=g))
    x, gate = torch.randn(2, 2, 3, 40, generator=g).to(dtype)
    return module, x, gate
