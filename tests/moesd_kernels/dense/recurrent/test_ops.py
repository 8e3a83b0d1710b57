"""The compiled operators on a CPU: accuracy, ragged rows, what is refused, ``torch.compile``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.fuzz import same
from support.oracle import assert_as_accurate
from support.recurrent import (
    CONVOLUTIONS,
    REFERENCES,
    all_calls,
    convolution_call,
    delta_call,
    mamba2_call,
    mamba_call,
)

from moesd_kernels.dense import ops, recurrent

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)


def small_calls(dtype):
    return [
        delta_call(2, 4, 1, 2, 20, 72, dtype),
        delta_call(2, 4, 1, 2, 20, 72, dtype, per_channel=True),
        mamba2_call(2, 4, 2, 1, 34, 20, dtype),
        mamba_call(2, 4, 34, 16, dtype),
    ]


@DTYPES
def test_as_accurate_as_the_references(dtype):
    for call in all_calls(dtype):
        call.check(getattr(recurrent, call.name))


@DTYPES
def test_a_token_does_not_depend_on_the_call_it_is_in(dtype):
    """However a row's tokens are parted, tried and replayed, and whatever rows are beside it."""
    for call in small_calls(dtype):
        function, (rows, keep, counts) = getattr(recurrent, call.name), call.ragged
        assert counts[0] == 4
        out, states = call.run(function)
        for kept in range(5):
            tried, after = call.tokens(0, 0, 4, kept).run(function)
            same(tried[0], out[0])
            replayed, _ = call._replace(states=after).tokens(0, kept, 4, 0).run(function)
            same(replayed[0], out[0, kept:])
            if kept == keep[0]:
                same(after[rows[0]], states[rows[0]])
        after = call.states
        for t in range(4):
            alone, after = call._replace(states=after).tokens(0, t, t + 1, 1).run(function)
            same(alone[0, 0], out[0, t])


@DTYPES
def test_only_accepted_tokens_and_named_rows_count(dtype):
    """NaN wherever nothing may be read: padding, rows that no sequence has, rows without tokens."""
    for call in small_calls(dtype):
        rows, Q = call.ragged[0], call.inputs[0].shape[1]
        keep, counts = torch.tensor([0, 2]), torch.tensor([Q, 3])
        call = call._replace(ragged=(rows, keep, counts))
        function = getattr(recurrent, call.name)
        out, states = call.run(function)
        unnamed = torch.ones(len(states), dtype=torch.bool).index_fill(0, rows, False)
        same(states[unnamed], call.states[unnamed])
        same(states[rows[0]], call.states[rows[0]])
        assert not torch.equal(states[rows[1]], call.states[rows[1]])
        assert (out[1, 3:] == 0).all() and (out[1, 2] != 0).any()

        for tensor in call.inputs:
            if tensor.dim() > 2:
                tensor[1, 3:] = float("nan")
        call.states[unnamed] = float("nan")
        same(call.run(function)[0], out)
        nothing = call._replace(ragged=(rows, keep * 0, counts * 0))
        empty, untouched = nothing.run(function)
        assert (empty == 0).all()
        same(untouched, call.states)


def sliced(tensor):
    """The same values as a slice of wider tokens, as of a joined projection."""
    wide = F.pad(tensor.flatten(2), (3, 1))
    return wide[..., 3:-1].unflatten(-1, tensor.shape[2:])


@DTYPES
def test_tokens_may_lie_anywhere(dtype):
    for call in small_calls(dtype):
        results = call.run(getattr(recurrent, call.name))
        spread = tuple(F.pad(tensor, (1, 2))[..., 1:-2] for tensor in call.inputs)
        slices = tuple(t if t.dim() < 3 else sliced(t) for t in call.inputs)
        for inputs in (spread, slices):
            moved = call._replace(inputs=inputs).run(getattr(recurrent, call.name))
            for actual, expected in zip(moved, results, strict=True):
                same(actual, expected)


@DTYPES
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_short_convolution(shape, dtype):
    window, weight, bias = convolution_call(*shape, dtype)
    for b, activation in ((None, None), (bias, None), (None, "silu"), (bias, "silu")):
        out = recurrent.short_convolution(window, weight, b, activation)

        def eager(window, weight, b, activation=activation):
            sums = F.conv1d(window.mT, weight[:, None], b, groups=len(weight)).mT
            return sums if activation is None else F.silu(sums)

        wide = (window.double(), weight.double(), None if b is None else b.double())
        assert_as_accurate(out, eager(window, weight, b), eager(*wide))
        same(recurrent.short_convolution(sliced(window), weight, b, activation), out)
        taps = weight.shape[1]
        alone = recurrent.short_convolution(window[-1:, -taps:], weight, b, activation)
        same(alone[0, 0], out[-1, -1])


def refused(call, message, error=ValueError, **changes):
    """``changes``: an input by its place, or the states, rows, keep or counts by name."""
    inputs, ragged = (
        list(call.inputs),
        dict(zip(("rows", "keep", "counts"), call.ragged, strict=True)),
    )
    states = changes.pop("states", call.states)
    for name, value in changes.items():
        if name in ragged:
            ragged[name] = value
        else:
            inputs[int(name.removeprefix("at_"))] = value
    with pytest.raises(error, match=message):
        getattr(recurrent, call.name)(*inputs, states, *ragged.values())


def test_wrong_states_and_rows_are_refused():
    for call in small_calls(torch.float32):
        states, (rows, keep, counts) = call.states, call.ragged
        refused(call, "states must be .*, got", states=states[..., :-1])
        refused(call, "states must be Float, got Double", TypeError, states=states.double())
        refused(call, "states must be contiguous", states=torch.stack([states] * 2, -1)[..., 0])
        refused(call, r"rows must be in \[0, 4\), got 4", IndexError, rows=rows * 0 + 4)
        refused(call, r"rows must be in \[0, 4\), got -1", IndexError, rows=rows * 0 - 1)
        refused(call, "rows must be int64, got Int", TypeError, rows=rows.int())
        refused(call, r"keep must be \[2\], got \[1\]", keep=keep[:1])
        refused(call, r"counts must be in \[0, 4\], got 5", counts=counts * 0 + 5)
        refused(
            call,
            r"keep must be in \[0, counts\], got 3 of 2",
            keep=keep * 0 + 3,
            counts=counts * 0 + 2,
        )
        refused(
            call,
            "rows that keep a token must be named once, got 1 for 0 and 1",
            rows=rows * 0 + 1,
            keep=keep * 0 + 1,
            counts=counts * 0 + 1,
        )
        twice = call._replace(ragged=(rows * 0 + 1, keep * 0, counts))
        twice.run(getattr(recurrent, call.name))


def test_wrong_inputs_are_refused():
    delta, channels, mamba2, mamba = small_calls(torch.float32)
    query, _, _, decay, beta = delta.inputs
    refused(delta, r"query must be \[B, Q, Hk, Dk\], got", at_0=query[0])
    refused(delta, r"key must be \[2, 4, 1, 20\], got \[2, 4, 1, 19\]", at_1=query[..., 1:])
    refused(delta, "key must be Float like value, got BFloat16", TypeError, at_1=query.bfloat16())
    refused(
        delta,
        "value heads must be a multiple of the key heads 3, got 2",
        at_0=query.expand(-1, -1, 3, -1),
    )
    refused(delta, r"decay must be \[2, 4, 2\], got \[2, 4, 1\]", at_3=decay[..., :1])
    refused(channels, r"decay must be \[2, 4, 2, 20\], got", at_3=channels.inputs[3][..., :1])
    refused(
        delta, "decay must be float32, bfloat16 or float16, got Long", TypeError, at_3=decay.long()
    )
    refused(delta, r"beta must be \[2, 4, 2\], got", at_4=beta[..., None])
    wide = delta_call(1, 1, 1, 1, 577, 1, torch.float32)
    refused(wide, r"the key dimension must be in \[1, 576\], got 577")

    x, dt, A, to_state, _, D = mamba2.inputs
    refused(mamba2, r"x must be \[B, Q, Hh, P\], got", at_0=x[0])
    refused(mamba2, r"B must be \[B, Q, G, N\], got", at_3=to_state[0])
    refused(mamba2, r"C must be \[2, 4, 1, 20\], got", at_4=to_state[..., 1:])
    refused(mamba2, r"dt must be \[2, 4, 2\], got", at_1=dt[..., :1])
    refused(mamba2, r"A must be \[2\], got", at_2=A[:1])
    refused(mamba2, r"D must be \[2\], got", at_5=D[:1])
    refused(
        mamba2,
        "heads must be a multiple of the groups 3, got 2",
        at_3=to_state.expand(-1, -1, 3, -1),
    )
    refused(mamba2_call(1, 1, 1, 1, 1, 513, torch.float32), r"the state size must be in \[1, 512\]")

    x, dt, A, to_state, _, D = mamba.inputs
    refused(mamba, r"x must be \[B, Q, channels\], got", at_0=x[0])
    refused(mamba, r"dt must be \[2, 4, 34\], got", at_1=dt[..., :1])
    refused(mamba, r"A must be \[34, 16\], got", at_2=A[:, :1])
    refused(mamba, "B must be Float like x, got Half", TypeError, at_3=to_state.half())


def test_wrong_convolutions_are_refused():
    window, weight, bias = convolution_call(2, 3, 10, 4, torch.float32)
    calls = [
        (r"window must be \[B, W - 1 \+ Q, C\], got", ValueError, (window[0], weight)),
        (r"weight must be \[C, W\], got", ValueError, (window, weight[:, None])),
        (r"weight must be \[10, 4\], got \[9, 4\]", ValueError, (window, weight[1:])),
        ("weight must be contiguous", ValueError, (window, weight.T.contiguous().T)),
        ("weight must be Float like window, got Half", TypeError, (window, weight.half())),
        (r"bias must be \[10\], got \[9\]", ValueError, (window, weight, bias[1:])),
        ("at least the 3 inputs before the first token", ValueError, (window[:, :2], weight)),
        (r"taps must be in \[1, 32\], got 33", ValueError, (window, torch.zeros(10, 33))),
        ("activation must be .*, got tanh", ValueError, (window, weight, bias, "tanh")),
    ]
    for message, error, arguments in calls:
        with pytest.raises(error, match=message):
            recurrent.short_convolution(*arguments)


def test_other_dtypes_take_the_reference():
    for call in small_calls(torch.float32):
        wide = call.double()
        expected = wide.run(REFERENCES[call.name])
        for actual, other in zip(wide.run(getattr(recurrent, call.name)), expected, strict=True):
            same(actual, other)


def test_nothing_gives_nothing():
    for call in small_calls(torch.float32):
        function, ragged = getattr(recurrent, call.name), call.ragged
        empty = tuple(t[:0] if t.dim() > 2 else t for t in call.inputs)
        assert function(*empty, call.states, *(t[:0] for t in ragged)).numel() == 0
        none = tuple(t[:, :0] if t.dim() > 2 else t for t in call.inputs)
        zero = ragged[1] * 0
        assert function(*none, call.states, ragged[0], zero, zero).shape[:2] == (2, 0)
    window, weight, _ = convolution_call(2, 3, 10, 4, torch.float32)
    assert recurrent.short_convolution(window[:, :3], weight).shape == (2, 0, 10)


@torch.no_grad()
def test_they_compile_for_any_number_of_tokens():
    def layer(window, weight, *arguments):
        out = recurrent.short_convolution(window, weight, None, "silu")
        return out, recurrent.gated_delta_rule(*arguments)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for B, Q in ((3, 5), (2, 3)):
        call = delta_call(B, Q, 2, 4, 16, 24, torch.float32)
        window, weight, _ = convolution_call(B, Q, 10, 4, torch.float32)
        states = call.states.clone(), call.states.clone()
        arguments = [(window, weight, *call.inputs, each, *call.ragged) for each in states]
        for actual, expected in zip(
            (*compiled(*arguments[0]), states[0]), (*layer(*arguments[1]), states[1]), strict=True
        ):
            same(actual, expected)


def test_op_contracts():
    """Schemas, fake implementations and tracing agree with the real operators."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for call in small_calls(torch.float32):
        operator = getattr(torch.ops.moesd, call.name).default
        arguments = (*call.inputs, call.states, *call.ragged)
        torch.library.opcheck(operator, arguments, test_utils=tests)
    window, weight, bias = convolution_call(2, 3, 10, 4, torch.float32)
    operator = torch.ops.moesd.short_convolution.default
    torch.library.opcheck(operator, (window, weight, bias, "silu"), test_utils=tests)
