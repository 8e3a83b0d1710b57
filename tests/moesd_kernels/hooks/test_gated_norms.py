"""Gated RMS norms of recurrent layers are recognised by what they compute, and keep it."""

from __future__ import annotations

import pytest
import torch
from support.recurrent.gated_norms import EPS, GATED_NORMS, gated_norm
from torch import nn
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from moesd_kernels.dense import ops, recurrent
from moesd_kernels.hooks.dense import accelerate_dense
from moesd_kernels.hooks.gated_norms import GatedNormRule, recognise_gated_norm
from moesd_kernels.hooks.shadow import shadow_of

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))


@pytest.mark.parametrize("name", GATED_NORMS)
@torch.no_grad()
def test_a_module_keeps_what_it_computes(name):
    rule = GATED_NORMS[name][1]
    module, x, gate = gated_norm(name, torch.bfloat16)
    own = module(x, gate)
    if module(x[:, :1], gate[:, :1]).shape != x[:, :1].shape:  # transformers 5.17
        assert recognise_gated_norm(module) is None and name.startswith("falcon_h1")
        return
    assert recognise_gated_norm(module) == GatedNormRule(EPS, **rule)
    assert accelerate_dense(module) == 1
    ours = module(x, gate)
    assert torch.equal(ours, recurrent.gated_rms_norm(x, gate, module.weight, EPS, **rule))
    torch.testing.assert_close(ours, own)


@torch.no_grad()
def test_what_the_operator_does_not_take_is_the_class_s_own():
    module, x, gate = gated_norm("zamba2", torch.bfloat16)
    expected = [module(x), module(x.float(), gate), module(x, gate.float())]
    assert accelerate_dense(module) == 1
    actual = [module(x), module(x.float(), gate), module(x, gate.float())]
    for ours, own in zip(actual, expected, strict=True):
        assert torch.equal(ours, own) and ours.dtype == own.dtype
    module.requires_grad_(False)
    for differentiated in (x, gate):
        differentiated.requires_grad_()
        with torch.enable_grad():
            assert module(x, gate).requires_grad
        differentiated.requires_grad_(False)


class OtherRMSNormGated(Zamba2RMSNormGated):
    """Of the same name, and something else."""

    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states, gate) + 1


class PlainRMSNormGated(nn.Module):
    """Takes no gate."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), EPS

    def forward(self, hidden_states):
        return hidden_states


@pytest.mark.parametrize(
    "module", [OtherRMSNormGated(8, 4), OtherRMSNormGated(8, 3), PlainRMSNormGated()]
)
def test_others_are_left_alone(module):
    assert recognise_gated_norm(module) is None
    assert accelerate_dense(module) == 0 and shadow_of(module) is None
