"""The recurrent layers' kernels on a GPU: accuracy, independence of the call, and in a graph.

Written without a GPU at hand; the same kernels run interpreted in ``interpreted/``.
"""

import pytest
import torch
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

from moesd_kernels.dense import recurrent
from moesd_kernels.dense.recurrent.convolution import short_convolution as reference
from moesd_kernels.experts.triton import unavailable_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"triton: {unavailable_reason()}"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def model_calls(dtype):
    """Sizes of models: Qwen3-Next, Kimi-Linear, Nemotron-H and Jamba."""
    return [
        delta_call(4, 5, 16, 32, 128, 128, dtype),
        delta_call(4, 5, 32, 32, 128, 128, dtype, per_channel=True),
        mamba2_call(4, 5, 128, 8, 64, 128, dtype),
        mamba_call(4, 5, 8192, 16, dtype),
    ]


@pytest.mark.first
@DTYPES
def test_as_accurate_as_the_references(dtype):
    for call in [*all_calls(dtype), *model_calls(dtype)]:
        here, exact, baseline = (
            c.run(f)
            for c, f in (
                (call.to("cuda"), getattr(recurrent, call.name)),
                (call.double(), REFERENCES[call.name]),
                (call, REFERENCES[call.name]),
            )
        )
        for actual, *others in zip(here, baseline, exact, strict=True):
            assert_as_accurate(actual.cpu(), *others, name=call.name)
    for sizes in CONVOLUTIONS:
        tensors = convolution_call(*sizes, dtype)
        actual = recurrent.short_convolution(*(t.cuda() for t in tensors), "silu").cpu()
        exact = reference(*(t.double() for t in tensors), "silu")
        assert_as_accurate(actual, reference(*tensors, "silu"), exact)


@DTYPES
def test_a_token_does_not_depend_on_the_call_it_is_in(dtype):
    for call in model_calls(dtype):
        function = getattr(recurrent, call.name)
        out, _ = call.to("cuda").run(function)
        after = call.states
        for t in range(5):
            one = call._replace(states=after).tokens(0, t, t + 1, 1).to("cuda")
            alone, moved = one.run(function)
            same(alone[0, 0], out[0, t])
            after = moved.cpu()


def test_they_are_captured_and_follow_their_inputs():
    for call in model_calls(torch.bfloat16):
        call, function = call.to("cuda"), getattr(recurrent, call.name)
        states = call.states.clone()
        function(*call.inputs, states, *call.ragged)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = function(*call.inputs, states, *call.ragged)
        call.ragged[1].copy_(call.ragged[2])
        states.copy_(call.states)
        graph.replay()
        for actual, expected in zip((captured, states), call.run(function), strict=True):
            same(actual, expected)
