"""vLLM's activations in our words, against its own formulas, and ids of experts elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesd_kernels import fused_experts
from moesd_vllm.mapping import experts_spec, local_ids

H, I = 16, 8
relu2 = lambda x: F.relu(x).square()
gelu_tanh = lambda x: F.gelu(x, approximate="tanh")


def swiglu_oai(gate: Tensor, up: Tensor, alpha: float, beta: float, limit: float) -> Tensor:
    """vLLM's ``swigluoai``: the formula of ``silu_and_mul_with_clamp``."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


# By vLLM's activation and its limit, alpha, beta: from [T, 2I] or [T, I] to [T, I].
FORMULAS = {
    ("silu", None, None, None): lambda x: F.silu(x[:, :I]) * x[:, I:],
    ("silu", 0.5, None, None): lambda x: (
        F.silu(x[:, :I].clamp(max=0.5)) * x[:, I:].clamp(-0.5, 0.5)
    ),
    ("gelu", None, None, None): lambda x: F.gelu(x[:, :I]) * x[:, I:],
    ("gelu", 0.5, None, None): lambda x: F.gelu(x[:, :I]) * x[:, I:],  # vLLM clamps silu alone
    ("gelu_tanh", None, None, None): lambda x: gelu_tanh(x[:, :I]) * x[:, I:],
    ("silu_no_mul", None, None, None): F.silu,
    ("gelu_no_mul", None, None, None): F.gelu,
    ("gelu_tanh_no_mul", None, None, None): gelu_tanh,
    ("relu2_no_mul", None, None, None): relu2,
    ("swigluoai", None, None, None): lambda x: swiglu_oai(x[:, ::2], x[:, 1::2], 1.702, 1.0, 7.0),
    ("swigluoai_uninterleave", 0.7, 1.3, 1.0): lambda x: swiglu_oai(
        x[:, :I], x[:, I:], 1.3, 1.0, 0.7
    ),
    ("swigluoai_uninterleave", 0.7, None, 1.0): lambda x: swiglu_oai(
        x[:, :I], x[:, I:], 1.0, 1.0, 0.7
    ),
}


@pytest.mark.parametrize("kind", FORMULAS, ids=str)
def test_an_activation_of_vllms_is_the_same_in_our_words(kind) -> None:
    spec = experts_spec(*kind)
    rows = 2 * I if spec.gated else I
    x, w13, w2 = torch.randn(3, H), torch.randn(1, rows, H), torch.randn(1, H, I)
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    expected = FORMULAS[kind](x @ w13[0].T) @ w2[0].T
    ours = fused_experts(x, w13, w2, ids, weights, spec=spec, backend="reference")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (("situ", None, None, None), "situ is none of ours"),
        (("swiglustep", None, None, None), "swiglustep is none of ours"),
        (("relu2", None, None, None), "relu2 is none of ours"),  # gated: vLLM has no formula
        (("swigluoai_no_mul", None, None, None), "none of ours"),
        (("swigluoai_uninterleave", None, None, 1.0), "limit None"),
        (("swigluoai_uninterleave", 7.0, 1.7, 0.0), "adds 0.0 where ours adds 1"),
        (("swigluoai_uninterleave", 7.0, 1.7, None), "adds None where ours adds 1"),
    ],
    ids=str,
)
def test_what_we_do_not_compute_is_refused(kind, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        experts_spec(*kind)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_elsewhere_and_padding_get_no_id_of_ours(dtype) -> None:
    expert_map = torch.tensor([-1, -1, 0, 1, -1, 2], dtype=torch.int32)
    ids = torch.tensor([[2, 0], [5, 3], [-1, 4]], dtype=dtype)
    local = local_ids(ids, expert_map)
    assert local.dtype == dtype
    assert local.tolist() == [[0, -1], [2, 1], [-1, -1]]
    assert local_ids(ids, None) is ids
