"""int8 and int4 groups: what is stored, how it is read, and how little is lost."""

from __future__ import annotations

import pytest
import torch

from moesd_kernels.formats import GROUPS, dequantize, quantize


def test_int8_is_code_times_scale():
    codes = torch.arange(-128, 128, dtype=torch.int8).view(2, 128)
    scale = torch.tensor([[0.5, -3.0], [1e-30, 0.0]]).bfloat16()  # G = 64
    actual = dequantize(codes, scale, "int8", torch.float32)
    assert torch.equal(actual, codes.float() * scale.float().repeat_interleave(64, dim=1))


def test_int4_is_code_less_eight_times_scale():
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    scale = torch.tensor([[0.5, -3.0], [1e-30, 0.0]]).bfloat16()  # G = 128
    actual = dequantize(packed, scale, "int4", torch.float32)
    assert actual.shape == (2, 256)
    codes = torch.stack((packed % 16, packed // 16), -1).view(2, 256).float() - 8
    assert torch.equal(actual, codes * scale.float().repeat_interleave(128, dim=1))


@pytest.mark.parametrize("group", [*GROUPS, 256])
@pytest.mark.parametrize(("name", "least", "most"), [("int8", -127, 127), ("int4", -8, 7)])
def test_no_weight_moves_by_more_than_its_rounding(name, least, most, group):
    """To the nearest step, or to the edge of the codes."""
    weight = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, scale = quantize(weight, name, group)
    assert scale.shape == (3, 5, 256 // group) and scale.dtype == torch.bfloat16
    assert stored.shape[-1] == (256 if name == "int8" else 128)
    step = scale.float().repeat_interleave(group, dim=-1)
    steps = weight.float() / step
    moved = dequantize(stored, scale, name, torch.float32) / step - steps.clamp(least, most)
    assert moved.abs().max() <= 0.5 + 1e-4
    beyond = (steps - steps.clamp(least, most)).abs()
    assert beyond.max() <= (
        0.5 if name == "int8" else 2.55
    )  # what bf16 rounds off a scale; -9.5's mirror


@pytest.mark.parametrize(("name", "largest"), [("int8", 0.0075), ("int4", 0.085)])
def test_the_error_of_normal_weights(name, largest):
    """Root of the mean square, relative: int4 with the scale absmax / 7 has 0.097."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    stored, scale = quantize(weight, name)
    error = dequantize(stored, scale, name, torch.float32) - weight
    assert error.square().mean().sqrt() / weight.square().mean().sqrt() < largest


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_a_group_can_say_exactly_it_says(name):
    """Zeros, and integers that reach the edge of the codes, times a power of two."""
    weight = torch.zeros(2, 64)
    weight[1, :32] = torch.tensor([-8.0, *range(-8, 8), *range(-7, 8)]) * 2**-5
    if name == "int8":
        weight[1, 0] = 127 * 2**-5
    stored, scale = quantize(weight, name)
    assert torch.equal(dequantize(stored, scale, name, torch.float32), weight)
    assert not scale[0].any() and not scale[1, 1]


def test_large_weights_are_taken_in_parts(monkeypatch):
    from moesd_kernels.formats import integer

    weight = torch.randn(7, 96)
    whole = [quantize(weight, name) for name in ("int8", "int4")]
    monkeypatch.setattr(integer, "_CHUNK", 160)
    parts = [quantize(weight, name) for name in ("int8", "int4")]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    ("name", "group", "message"),
    [
        ("int2", 32, "'int8' or 'int4', got 'int2'"),
        ("int8", 16, r"one of \(32, 64, 128\) or the depth 192, got 16"),
        ("int4", 128, "multiple of 128, got 192"),
    ],
)
def test_refusals(name, group, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.zeros(2, 192), name, group)
