"""The gated RMS norm's kernel, interpreted."""

import pytest
import torch
import torch.nn.functional as F
from support.oracle import assert_as_accurate
from support.recurrent.gated_norms import EPS, GATED_NORMS, gated_norm

from moesd_kernels.dense.recurrent.gated_norm import gated_rms_norm as reference
from moesd_kernels.dense.triton.recurrent.gated_norm_kernel import gated_rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", GATED_NORMS)
def test_as_accurate_as_the_reference(name, dtype):
    module, x, gate = gated_norm(name, dtype)
    rule, weight = GATED_NORMS[name][1], module.weight
    out = gated_rms_norm(x, gate, weight, EPS, **rule)
    exact = reference(*(t.double() for t in (x, gate, weight)), EPS, **rule)
    assert_as_accurate(out, reference(x, gate, weight, EPS, **rule), exact, name=name)
    sliced = F.pad(gate, (3, 1))[..., 3:-1]
    assert torch.equal(gated_rms_norm(x, sliced, weight, EPS, **rule), out)
    alone = gated_rms_norm(x[1, 2], gate[1, 2], weight, EPS, **rule)
    assert torch.equal(alone, out[1, 2])
    few = weight[: rule["group"]]
    each = gated_rms_norm(x, gate, few.repeat(40 // rule["group"]), EPS, **rule)
    assert torch.equal(gated_rms_norm(x, gate, few, EPS, **rule), each)


def test_wrong_arguments_are_refused():
    module, x, gate = gated_norm("qwen3_next", torch.float32)
    w = module.weight
    calls = [
        (r"gate must be \[2, 3, 40\], got", ValueError, (x, gate[..., 1:], w), 40, "silu"),
        ("gate must be torch.float32", TypeError, (x, gate.half(), w), 40, "silu"),
        (r"w must be \[40\], got \[39\]", ValueError, (x, gate, w[1:]), 40, "silu"),
        ("the width of x must be a multiple of the group 7", ValueError, (x, gate, w), 7, "silu"),
        (r"group must be in \[1, 16384\], got 0", ValueError, (x, gate, w), 0, "silu"),
        ("activation must be silu or sigmoid, got relu", ValueError, (x, gate, w), 40, "relu"),
    ]
    for message, error, tensors, group, activation in calls:
        with pytest.raises(error, match=message):
            gated_rms_norm(*tensors, EPS, group, False, True, activation)
