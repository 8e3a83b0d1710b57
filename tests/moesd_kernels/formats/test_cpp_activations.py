"""``moesd::linear`` with activations of eight bits: the definition, and rows that stand alone."""

from __future__ import annotations

import pytest
import torch
from support.formats import INTEGERS, check_int8_product, stored_weight

from moesd_kernels.dense import ops
from moesd_kernels.formats import WEIGHT_FORMATS, dequantize

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = (0, 1, 3, 4, 5, 8, 12, 16, 17, 33, 130)
FEATURES = (1, 37, 100)
# Of one run or block, of the 24 runs that are read at a time and less, and of several times those.
DEPTHS = {32: (32, 576, 800, 2304), 256: (256, 768, 2048, 2304)}
CASES = [(name, 32) for name in INTEGERS] + [
    (name, g) for name in ("int8", "int4") for g in (64, 128)
]


def depths_of(name: str, group: int) -> list[int]:
    block = max(WEIGHT_FORMATS[name].block, group if name in ("int8", "int4") else 32)
    return [depth for depth in DEPTHS[256 if block == 256 else 32] if depth % block == 0] + (
        [block] if block in (64, 128) else []
    )


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounding(x, weight, scale, name, bias=None):
    options = {"scale": scale, "weight_format": name, "int8_activations": True}
    return ops.linear(x, weight, bias, **options)


def test_these_are_the_formats():
    ggml = {"q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"}
    assert set(INTEGERS) == {"int8", "int4", "mxfp4"} | ggml


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "group"), CASES)
def test_the_definition(name, group, dtype):
    for depth in depths_of(name, group):
        for features in FEATURES:
            weight, scale = stored_weight(name, features, depth, group=group)
            bias = numbers(features, dtype=dtype, seed=1)
            for tokens in TOKENS:
                x = numbers(tokens, depth, dtype=dtype, seed=tokens)
                check_int8_product(rounding(x, weight, scale, name), x, weight, scale, name)
                out = rounding(x, weight, scale, name, bias)
                check_int8_product(out, x, weight, scale, name, bias)


@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x7F, 0x80])
@pytest.mark.parametrize(("name", "group"), CASES)
def test_codes_at_their_extremes(name, group, byte):
    """Sums of a run are exact whatever its codes: all of one sign, and the largest."""
    depth = 2304
    weight, scale = stored_weight(name, 37, depth, group=group)
    blocks = weight.view(torch.uint8).view(37, -1, WEIGHT_FORMATS[name].stored)
    heads = {"q8_0": 2, "q4_0": 2, "q4_1": 4, "q5_0": 2, "q5_1": 4, "q4_k": 16, "q5_k": 16}
    head = heads.get(name, 0)
    blocks[..., head : 192 if name == "q6_k" else None] = byte
    signs = torch.where(torch.arange(depth) % 2 == 0, 1.0, -1.0)
    x = torch.stack([torch.ones(depth), -torch.ones(depth), signs, -signs, signs.sort().values])
    for tokens in (x[:1], x[:4], x, x.repeat(4, 1)):
        for factor in (3.0, 2.0**-20):
            rows = tokens * factor
            check_int8_product(rounding(rows, weight, scale, name), rows, weight, scale, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_sums_of_integers_are_exact(name, dtype):
    """One activation of 127 in a row, at each place: the weights themselves, to the bit."""
    depth = max(WEIGHT_FORMATS[name].block, 64)
    weight, scale = stored_weight(name, 37, depth)
    x = torch.eye(depth, dtype=dtype) * 127
    out = rounding(x, weight, scale, name).float()
    values = dequantize(weight, scale, name, torch.float32)
    if name in ("q4_1", "q5_1", "q4_k", "q5_k"):  # codes and minimum are added after the product
        torch.testing.assert_close(out, (127 * values.T).to(dtype).float(), rtol=1e-2, atol=1e-2)
        return
    assert torch.equal(out, (127 * values.double()).T.float().to(dtype).float())


@pytest.mark.parametrize("name", INTEGERS)
def test_activations_may_lie_apart(name):
    weight, scale = stored_weight(name, 37, 768)
    wide, turned = numbers(9, 1536)[:, ::2], numbers(768, 9).T
    for x in (wide, turned, wide[::2], numbers(1, 768).expand(9, 768)):
        out = rounding(x, weight, scale, name)
        assert torch.equal(out, rounding(x.contiguous(), weight, scale, name))
        check_int8_product(out, x, weight, scale, name)


@pytest.mark.parametrize("name", INTEGERS)
def test_weights_and_scales_may_begin_anywhere(name):
    """A byte later, and scales two bytes later: rows of an odd number of groups lie so anyway."""
    x, (weight, scale) = numbers(9, 768), stored_weight(name, 37, 768)
    expected = rounding(x, weight, scale, name)
    for offset in (1, 3):
        moved = [
            t
            if t is None
            else torch.cat([t.flatten()[:offset], t.flatten()])[offset:].view(t.shape)
            for t in (weight.view(torch.uint8), scale)
        ]
        again = rounding(x, moved[0].view(weight.dtype), moved[1], name)
        assert torch.equal(again, expected)


def test_every_exponent_of_mxfp4():
    """Powers of two from the least to the largest, and the one that is NaN."""
    rows, groups = 33, 255
    codes = torch.full((rows, groups * 16), 0x77, dtype=torch.uint8)  # all 6
    scale = ((torch.arange(groups) + 7 * torch.arange(rows)[:, None]) % 255).to(torch.uint8)
    x = torch.eye(groups).repeat_interleave(32, 1) * 127
    for exponents in (scale, scale.flip(1)):
        out = rounding(x, codes, exponents, "mxfp4")
        expected = 127 * 6 * 32 * torch.exp2(exponents.T.double() - 127)
        assert torch.equal(out, expected.float())
    scale[5, 3] = 255
    out = rounding(x, codes, scale, "mxfp4")
    assert out[:, 5].isnan().all() and out.isnan().sum() == groups


@pytest.mark.parametrize("groups", [1, 3, 5, 25])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_odd_number_of_scales_in_a_row(name, groups):
    for group in (32, 64, 128):
        weight, scale = stored_weight(name, 33, groups * group, group=group)
        assert scale.shape == (33, groups)
        for tokens in (1, 5, 17):
            x = numbers(tokens, groups * group)
            check_int8_product(rounding(x, weight, scale, name), x, weight, scale, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_row_that_is_not_finite_is_alone(name, value):
    """No output of it is finite, and the others are what they were."""
    weight, scale = stored_weight(name, 37, 256)
    for tokens in (3, 17):
        x = numbers(tokens, 256)
        before = rounding(x, weight, scale, name)
        x[1, 77] = value
        out = rounding(x, weight, scale, name)
        assert not out[1].isfinite().any()
        assert torch.equal(out[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("tiny", [1e-37, 1e-45, 0.0])
@pytest.mark.parametrize("name", INTEGERS)
def test_runs_of_next_to_nothing_are_nothing(name, tiny):
    weight, scale = stored_weight(name, 37, 256)
    assert not rounding(torch.full((5, 256), tiny), weight, scale, name).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_a_row_has_the_same_bits_in_any_company(name, dtype, threads):
    """Alone, among any others in any order, and on any number of threads."""
    depth, features = 2304, 1000
    weight, scale = stored_weight(name, features, depth)
    x, bias = numbers(130, depth, dtype=dtype), numbers(features, dtype=dtype)
    threads(1)
    expected = rounding(x, weight, scale, name, bias)
    for count in (1, 2):
        threads(count)
        assert torch.equal(rounding(x, weight, scale, name, bias), expected)
        order = torch.randperm(130, generator=torch.Generator().manual_seed(count))
        for tokens in (1, 2, 4, 5, 8, 9, 12, 15, 16, 17, 20, 21, 33, 129):
            rows = order[:tokens]
            out = rounding(x[rows], weight, scale, name, bias)
            assert torch.equal(out, expected[rows]), (count, tokens)


@pytest.mark.parametrize("name", INTEGERS)
def test_an_output_has_the_same_bits_beside_any_others(name):
    """Of weight rows, which are read sixteen at a time."""
    depth = 576 if WEIGHT_FORMATS[name].block <= 32 else 768
    weight, scale = stored_weight(name, 100, depth)
    x = numbers(17, depth)
    expected = rounding(x, weight, scale, name)
    for rows in (slice(1), slice(16), slice(3, 40), slice(99, 100), slice(15, 100)):
        part = None if scale is None else scale[rows]
        assert torch.equal(rounding(x, weight[rows], part, name), expected[:, rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in WEIGHT_FORMATS if name not in INTEGERS])
def test_other_formats_take_activations_as_they_are(name, dtype):
    weight, scale = stored_weight(name, 37, 256)
    weight = weight.to(dtype) if name == "plain" else weight
    for tokens in (1, 5, 17):
        x = numbers(tokens, 256, dtype=dtype)
        plain = ops.linear(x, weight, scale=scale, weight_format=name)
        assert torch.equal(rounding(x, weight, scale, name), plain)


@pytest.mark.parametrize("name", INTEGERS)
def test_it_is_a_choice(name):
    """Off, the weights' own product, bit for bit; on, another."""
    weight, scale = stored_weight(name, 37, 256)
    x = numbers(5, 256)
    options = {"scale": scale, "weight_format": name}
    plain = ops.linear(x, dequantize(weight, scale, name, x.dtype))
    assert torch.equal(ops.linear(x, weight, **options), plain)
    assert torch.equal(ops.linear(x, weight, **options, int8_activations=False), plain)
    assert not torch.equal(rounding(x, weight, scale, name), plain)
