"""The references are what transformers' own functions compute, over rows that begin anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.recurrent import REFERENCES, all_calls, delta_call, mamba2_call, mamba_call
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

from moesd_kernels.dense.recurrent import convolution


def all_of_them(call):
    """The call with every token there and accepted."""
    rows, counts, Q = call.ragged[0], call.ragged[2], call.inputs[0].shape[1]
    full = torch.full_like(counts, Q)
    return call._replace(ragged=(rows, full, full))


def close(call, out: Tensor, states: Tensor) -> None:
    actual, after = call.run(REFERENCES[call.name])
    torch.testing.assert_close(actual, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[call.ragged[0]], states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_gated_delta_rule(per_channel):
    call = all_of_them(delta_call(3, 4, 2, 4, 16, 24, torch.float32, per_channel=per_channel))
    query, key, value, decay, beta = call.inputs
    rule = (
        modeling_kimi_linear.recurrent_kimi_delta_attention
        if per_channel
        else modeling_qwen3_next.torch_recurrent_gated_delta_rule
    )
    each = query.repeat_interleave(2, 2), key.repeat_interleave(2, 2), value
    out, states = rule(
        *each,
        g=decay,
        beta=beta,
        initial_state=call.states[call.ragged[0]],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    close(call, out, states)


def test_mamba2():
    call = all_of_them(mamba2_call(3, 4, 4, 2, 6, 16, torch.float32))
    x, dt, A, to_state, from_state, D = call.inputs
    states, outs = call.states[call.ragged[0]], []
    for t in range(4):
        wide = dt[:, t, :, None].expand(-1, -1, 6), A[:, None, None].expand(-1, 6, 16)
        outs += [
            modeling_mamba2.mamba2_selective_state_update(
                states, x[:, t], *wide, to_state[:, t], from_state[:, t], D[:, None].expand(-1, 6)
            )
        ]
    close(call, torch.stack(outs, 1), states)


def test_mamba():
    call = all_of_them(mamba_call(3, 4, 40, 16, torch.float32))
    x, dt, A, to_state, from_state, D = call.inputs
    states, outs = call.states[call.ragged[0]], []
    for t in range(4):
        outs += [
            modeling_mamba.mamba_selective_state_update(
                states, x[:, t], dt[:, t], A, to_state[:, t], from_state[:, t], D
            )
        ]
    close(call, torch.stack(outs, 1), states)


@pytest.mark.parametrize("taps", [3, 4])
def test_convolution(taps):
    g = torch.Generator().manual_seed(0)
    window = torch.randn(2, taps + 4, 10, generator=g).bfloat16()
    weight, bias = torch.randn(10, taps, generator=g).bfloat16(), torch.ones(10).bfloat16()
    for b, activation in ((None, "silu"), (bias, None), (bias, "silu")):
        sums = F.conv1d(window.mT, weight[:, None], b, groups=10).mT
        expected = sums if activation is None else F.silu(sums)
        assert torch.equal(convolution.short_convolution(window, weight, b, activation), expected)


def test_what_is_there_twice_or_not_at_all_is_refused():
    for call in (all_calls(torch.float32)[0], all_calls(torch.float32)[-1]):
        rows, keep, counts = call.ragged
        wrong = {
            r"0 <= keep <= counts <= \d, got": (rows, counts + 1, counts),
            "got -1 and": (rows, keep * 0 - 1, counts),
            r"counts <= \d, got 0 and 9": (rows, keep * 0, keep * 0 + 9),
        }
        if len(rows) > 1:
            twice = torch.ones_like(keep)
            wrong["must be named once, got 1 twice"] = rows * 0 + 1, twice, twice
        for message, ragged in wrong.items():
            with pytest.raises(ValueError, match=message):
                call._replace(ragged=ragged).run(REFERENCES[call.name])
