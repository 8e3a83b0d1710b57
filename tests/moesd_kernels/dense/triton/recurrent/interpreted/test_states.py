"""The kernels over states, interpreted: accuracy, ragged rows, independence of the call."""

import pytest
import torch
from support.fuzz import same
from support.recurrent import Call, all_calls, delta_call, mamba2_call, mamba_call

from moesd_kernels.dense.triton.recurrent.delta_rule_kernel import gated_delta_rule
from moesd_kernels.dense.triton.recurrent.state_space_kernel import (
    selective_scan,
    selective_state_update,
)

KERNELS = {
    "gated_delta_rule": gated_delta_rule,
    "selective_state_update": selective_state_update,
    "selective_scan": selective_scan,
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return call.run(KERNELS[call.name])


def small_calls(dtype):
    return [
        delta_call(2, 3, 1, 2, 20, 24, dtype),
        delta_call(2, 3, 1, 2, 20, 24, dtype, per_channel=True),
        mamba2_call(2, 3, 2, 1, 10, 20, dtype),
        mamba_call(2, 3, 10, 16, dtype),
    ]


@DTYPES
def test_as_accurate_as_the_references(dtype):
    for call in all_calls(dtype):
        call.check(KERNELS[call.name])


@DTYPES
def test_a_token_does_not_depend_on_the_call_it_is_in(dtype):
    for call in small_calls(dtype):
        rows, keep, _ = call.ragged
        out, states = run(call)
        tried, after = run(call.tokens(0, 0, 3, 1))
        same(tried[0], out[0])
        replayed, after = run(call._replace(states=after).tokens(0, 1, 3, 1))
        same(replayed[0], out[0, 1:])
        last, _ = run(call._replace(states=after).tokens(0, 2, 3, 0))
        same(last[0], out[0, 2:])
        _, kept = run(call.tokens(0, 0, int(keep[0]), int(keep[0])))
        same(kept[rows[0]], states[rows[0]])


def test_only_accepted_tokens_and_named_rows_count():
    """NaN wherever nothing may be read: padding, and rows that no sequence has."""
    for call in small_calls(torch.float32):
        rows, keep, counts = call.ragged[0], torch.tensor([0, 1]), torch.tensor([3, 2])
        call = call._replace(ragged=(rows, keep, counts))
        out, states = run(call)
        unnamed = torch.ones(len(states), dtype=torch.bool).index_fill(0, rows, False)
        same(states[unnamed], call.states[unnamed])
        same(states[rows[0]], call.states[rows[0]])
        assert not torch.equal(states[rows[1]], call.states[rows[1]])
        assert (out[1, 2:] == 0).all()
        for tensor in call.inputs:
            if tensor.dim() > 2:
                tensor[1, 2:] = float("nan")
        call.states[unnamed] = float("nan")
        same(run(call)[0], out)


def test_what_a_host_would_refuse_does_no_harm():
    """Rows outside the states, and more tokens than there are: a graph's padding may hold any."""
    for call in small_calls(torch.float32):
        rows, keep, counts = call.ragged
        nowhere = torch.tensor([len(call.states), -1])
        out, states = run(call._replace(ragged=(nowhere, counts, counts)))
        assert (out == 0).all()
        same(states, call.states)
        full = torch.full_like(counts, 3)
        expected = run(call._replace(ragged=(rows, full, full)))
        same(run(call._replace(ragged=(rows, full, full + 5)))[0], expected[0])
        assert (run(call._replace(ragged=(rows, keep, counts * 0 - 1)))[0] == 0).all()


def test_wrong_arguments_are_refused():
    delta, _, mamba2, mamba = small_calls(torch.float32)

    def refused(call, message, error=ValueError, states=None, rows=None, **changes):
        inputs = [changes.get(f"at_{i}", tensor) for i, tensor in enumerate(call.inputs)]
        ragged = (call.ragged[0] if rows is None else rows, *call.ragged[1:])
        with pytest.raises(error, match=message):
            KERNELS[call.name](*inputs, call.states if states is None else states, *ragged)

    for call in (delta, mamba2, mamba):
        states = call.states
        refused(call, r"states must be \[4, .*\], got", states=states[..., :-1])
        refused(call, "states must be torch.float32", TypeError, states=states.half())
        refused(call, "states must be contig", states=torch.stack([states] * 2, -1)[..., 0])
        refused(call, r"rows must be \[2\], got \[1\]", rows=call.ragged[0][:1])
        refused(call, "rows must be torch.int64", TypeError, rows=call.ragged[0].int())
    query, _, value, decay, _ = delta.inputs
    refused(delta, r"query must be \[B, Q, Hk, Dk\], got", at_0=query[0])
    refused(delta, r"key must be \[2, 3, 1, 20\], got", at_1=query[..., 1:])
    refused(delta, "value heads must be a multiple", at_0=query.expand(-1, -1, 3, -1))
    refused(delta, r"decay must be \[2, 3, 2\], got", at_3=decay[..., :1])
    refused(delta, "value must be float32, bfloat16 or float16", TypeError, at_2=value.long())
    refused(delta, "beta must be float32, bfloat16 or float16", TypeError, at_4=decay.long())
    refused(mamba, "B must be torch.float32, got", TypeError, at_3=mamba.inputs[3].half())
    refused(mamba2, "heads must be a multiple", at_3=mamba2.inputs[3].expand(-1, -1, 3, -1))
    refused(mamba2, r"A must be \[2\], got", at_2=mamba2.inputs[2][:1])
    refused(mamba, r"C must be \[B, Q, N\], got", at_4=mamba.inputs[4][0])
    refused(mamba, r"D must be \[10\], got", at_5=mamba.inputs[5][:1])
