"""The short convolution's kernel, interpreted."""

import pytest
import torch
import torch.nn.functional as F
from support.oracle import assert_as_accurate
from support.recurrent import CONVOLUTIONS, convolution_call

from moesd_kernels.dense.triton.recurrent.convolution_kernel import short_convolution


def eager(window, weight, bias, activation):
    sums = F.conv1d(window.mT, weight[:, None], bias, groups=len(weight)).mT
    return sums if activation is None else F.silu(sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_as_accurate_as_torch(shape, dtype):
    window, weight, bias = convolution_call(*shape, dtype)
    for b, activation in ((None, None), (bias, "silu")):
        out = short_convolution(window, weight, b, activation)
        wide = window.double(), weight.double(), None if b is None else b.double()
        assert_as_accurate(out, eager(window, weight, b, activation), eager(*wide, activation))
        alone = short_convolution(window[-1:, -weight.shape[1] :], weight, b, activation)
        assert torch.equal(alone[0, 0], out[-1, -1])


def test_tokens_may_lie_anywhere():
    window, weight, bias = convolution_call(2, 3, 10, 4, torch.float32)
    sliced = F.pad(window, (3, 1))[..., 3:-1]
    expected = short_convolution(window, weight, bias)
    assert torch.equal(short_convolution(sliced, weight, bias), expected)
    assert short_convolution(window[:, :3], weight).shape == (2, 0, 10)


def test_wrong_arguments_are_refused():
    window, weight, bias = convolution_call(2, 3, 10, 4, torch.float32)
    calls = [
        (r"window must be \[B, W - 1 \+ Q, C\], got", ValueError, (window[0], weight)),
        (r"weight must be \[10, 4\], got \[9, 4\]", ValueError, (window, weight[1:])),
        ("weight must be torch.float32", TypeError, (window, weight.half())),
        (r"bias must be \[10\], got \[9\]", ValueError, (window, weight, bias[1:])),
        ("at least the 3 inputs before the first token", ValueError, (window[:, :2], weight)),
        (r"taps must be in \[1, 32\], got 33", ValueError, (window, torch.zeros(10, 33))),
        ("activation must be one of", ValueError, (window, weight, bias, "tanh")),
    ]
    for message, error, arguments in calls:
        with pytest.raises(error, match=message):
            short_convolution(*arguments)
