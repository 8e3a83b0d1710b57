"""The table of formats, and what is said of tensors that are not what their format says."""

from __future__ import annotations

import pytest
import torch

from decoder.perf_model.model_spec import WEIGHT_BYTES
from moesd_kernels.formats import WEIGHT_FORMATS, check_weight, dequantize


def stored_zeros(name: str, *leading: int, rows: int = 6, depth: int = 256):
    """Weight and scale of that format, all bytes zero."""
    known = WEIGHT_FORMATS[name]
    weight = torch.zeros(*leading, rows, known.width(depth), dtype=torch.uint8)
    weight = weight.to(known.dtype or torch.bfloat16)
    if known.scale_dtype is None:
        return weight, None
    shape = known.scale_shapes(rows, depth)[0]
    return weight, torch.zeros(*leading, *shape, dtype=known.scale_dtype)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_format_is_one_thing_everywhere(name):
    known = WEIGHT_FORMATS[name]
    weight, scale = stored_zeros(name, 2)
    check_weight("w", weight, scale, known, (2, 6, 256))
    assert known.depth(weight) == 256
    values = dequantize(weight, scale, name, torch.bfloat16)
    assert values.shape == (2, 6, 256) and values.dtype == torch.bfloat16
    tensors = [weight] + ([] if scale is None else [scale])
    bits = 8 * sum(t.nbytes for t in tensors) / values.numel()
    if name == "fp8_block":  # 6 rows have the scales of 128
        assert known.bits() == 8 + 32 / 128**2
    else:
        assert known.bits() == bits


@pytest.mark.parametrize(("name", "bits"), [("int8", 8.125), ("int4", 4.125), ("q4_k", 4.5)])
def test_a_group_costs_its_scale(name, bits):
    assert WEIGHT_FORMATS[name].bits(128) == bits


def test_what_does_not_fit_is_said():
    weight, scale = stored_zeros("int4", 2)

    def raises(
        error, message, weight=weight, scale=scale, name="int4", experts=2, rows=6, depth=256
    ):
        with pytest.raises(error, match=message):
            check_weight("w_down", weight, scale, WEIGHT_FORMATS[name], (experts, rows, depth))

    raises(TypeError, "w_down in format int4 must be torch.uint8, got torch.int8", weight.char())
    raises(ValueError, r"must be \(2, 6, 128\) .* got \(2, 6, 127\)", weight[..., 1:])
    raises(ValueError, r"must be \(2, 7, 128\) .* got \(2, 6, 128\)", rows=7)
    raises(ValueError, r"must be \(3, 6, 128\) for weights \(3, 6, 256\)", experts=3)
    raises(ValueError, "multiple of 32, got 100", depth=100)
    raises(TypeError, "needs a scale, got None", scale=None)
    raises(TypeError, "scale of w_down in format int4 must be torch.bfloat16", scale=scale.half())
    raises(ValueError, r"must be \(2, 6, 8\) or \(2, 6, 4\) or \(2, 6, 2\)", scale=scale[..., 1:])
    raises(ValueError, "must be on cpu like it, got meta", scale=scale.to("meta"))
    raises(ValueError, "multiple of 256, got 288", name="q4_k", depth=288)
    raises(TypeError, "takes no scale", stored_zeros("q8_0", 2)[0], name="q8_0")


def test_the_planner_counts_the_same_bytes():
    names = {"fp8": "fp8_block"}
    for name, size in WEIGHT_BYTES.items():
        known = WEIGHT_FORMATS.get(names.get(name, name))
        assert size == (known.bits() / 8 if known else int(name[2:]) / 8), name
