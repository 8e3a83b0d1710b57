"""The reference against the formula written out token by token, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.oracle import make_case

from moesd_kernels.experts.reference import fused_experts_reference, fused_experts_torch
from moesd_kernels.experts.spec import DEFAULT_SPEC, ExpertsWeights, TopK


def test_reference_is_the_formula():
    x, w_gate_up, w_down, ids, weights = make_case(5, 2, 3, 4, 6, torch.float64).tensors
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for t in range(5):
        for k in range(2):
            e = ids[t, k]
            gate, up = w_gate_up[e, :6] @ x[t], w_gate_up[e, 6:] @ x[t]
            expected[t] += weights[t, k] * (w_down[e] @ (F.silu(gate) * up))
    routing = TopK(ids, weights.double())
    actual = fused_experts_reference(x, ExpertsWeights(w_gate_up, w_down), routing, DEFAULT_SPEC)
    torch.testing.assert_close(actual, expected)


def test_gpt_oss_gate_is_the_formula():
    case = make_case(
        *(4, 1, 2, 6, 5),
        torch.float64,
        bias=True,
        interleaved=True,
        transposed=True,
        activation_limit=0.5,
        activation_alpha=1.7,
    )
    x, w_gate_up, w_down, ids, weights = case.tensors
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for t in range(4):
        e = ids[t, 0]
        projected = x[t] @ w_gate_up[e] + case.options["gate_up_bias"][e]
        gate = projected[0::2].clamp(max=0.5)
        up = projected[1::2].clamp(-0.5, 0.5)
        active = (up + 1) * gate * torch.sigmoid(1.7 * gate)
        expected[t] = weights[t, 0] * (active @ w_down[e] + case.options["down_bias"][e])
    actual = fused_experts_reference(*case.as_run())
    torch.testing.assert_close(actual, expected)


def test_low_precision_is_computed_in_fp32():
    case = make_case(6, 2, 4, 32, 16, torch.bfloat16)
    x, weights, routing, spec = case.as_run()
    wide = ExpertsWeights(weights.gate_up.float(), weights.down.float())
    single = fused_experts_reference(x.float(), wide, routing, spec)
    assert torch.equal(fused_experts_reference(*case.as_run()), single.bfloat16())


@pytest.mark.parametrize("function", [fused_experts_reference, fused_experts_torch])
def test_gradients(function):
    x, w_gate_up, w_down, ids, weights = make_case(3, 2, 3, 4, 2, torch.float64).tensors
    inputs = [t.double().requires_grad_() for t in (x, w_gate_up, w_down, weights)]

    def layer(x, w_gate_up, w_down, weights):
        return function(x, ExpertsWeights(w_gate_up, w_down), TopK(ids, weights), DEFAULT_SPEC)

    assert torch.autograd.gradcheck(layer, inputs)
