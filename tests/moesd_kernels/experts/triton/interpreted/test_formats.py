"""Quantised weights, interpreted: bit for bit the plain kernel on the numbers they stand for.

Both run the same tiles, so that any difference is a weight that was read wrong.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from support.formats import quantised_case
from support.oracle import check_rows

from moesd_kernels.experts.triton import fused_experts_triton, layer
from moesd_kernels.experts.triton.formats import matrices
from moesd_kernels.experts.triton.formats.loader import load_weights, packed, scale_pointers
from moesd_kernels.experts.triton.types import A100, LayerTiles, TileConfig
from moesd_kernels.formats import dequantize

SMALL = TileConfig(block_m=16, block_n=64, block_k=64)
SINGLE = TileConfig(block_m=16, block_n=64, block_k=128)
CONFIG = LayerTiles(SMALL, SMALL, SINGLE, SINGLE)
FORMATS = [("fp8_block", 128), ("mxfp4", 32), ("int8", 128), ("int4", 32)]


def check(stored, plain, config=CONFIG, **options):
    got = stored.run(fused_experts_triton, config=config, **options)
    expected = plain.run(fused_experts_triton, config=config, **options)
    assert torch.equal(got, expected)
    check_rows(plain, got)


@pytest.mark.parametrize(
    ("T", "dtype"),
    [(0, torch.float32), (1, torch.float32), (1, torch.float16), (40, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_format(name, group, T, dtype):
    """T = 40 are two blocks of an expert; FP8's odd sizes need every mask, and the rows of up
    begin inside of a scale's square."""
    H, I = (135, 69) if name == "fp8_block" else (2 * group, group)
    check(*quantised_case(name, T, 1, 2, H, I, dtype, group=group))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_one_scale_for_a_row(name):
    check(*quantised_case(name, 5, 2, 3, 96, 96, group=96))


@pytest.mark.parametrize(("name", "T"), [("fp8_block", 1), ("mxfp4", 1), ("mxfp4", 5), ("int4", 5)])
def test_options_of_gpt_oss(name, T):
    options = {"interleaved": True, "bias": True, "activation_limit": 0.7}
    check(*quantised_case(name, T, 2, 3, 96, 64, activation_alpha=1.702, **options))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(
    ("name", "down"), [("int4", "int8"), ("plain", "mxfp4"), ("fp8_block", "plain")]
)
def test_two_formats_in_one_layer(name, down, T):
    check(*quantised_case(name, T, 2, 3, 64, 32, down=down))


@pytest.mark.parametrize(("name", "T"), [("fp8_block", 5), ("mxfp4", 1)])
def test_no_gate(name, T):
    check(*quantised_case(name, T, 2, 3, 64, 32, gated=False, activation="relu2"))


@pytest.mark.parametrize("name", ["fp8_block", "int4"])
@pytest.mark.parametrize(
    ("down", "why"),
    [
        (TileConfig(16, 128, 64, swap_ab=True), "swapped"),
        (TileConfig(16, 128, 32), "several steps a scale"),
        (TileConfig(16, 64, 256), "several scales a step"),
        (TileConfig(16, 128, 64, split_k=3), "more splits than steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tiling(name, down, why):
    config = LayerTiles(replace(down, split_k=1), down, None, SINGLE)
    check(*quantised_case(name, 5, 1, 1, 128, 256, group=64), config=config)


@pytest.mark.parametrize("T", [1, 3])
def test_ids_that_are_no_expert(T):
    ids = torch.tensor([[-1, 2], [4, 1], [9, -3]])[:T]
    check(*quantised_case("mxfp4", T, 2, 3, 64, 96, ids=ids))


@pytest.mark.parametrize(
    ("name", "T"), [("fp8_block", 1), ("mxfp4", 1), ("int8", 4), ("int4", 4), ("mxfp4", 300)]
)
def test_selected_tiles(name, T):
    stored, plain = quantised_case(name, T, 1, 2, 64, 64, torch.float16)
    check_rows(plain, stored.run(fused_experts_triton))


@triton.jit
def _load_kernel(w_ptr, scale_ptr, out_ptr, C, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    """One program: the rows of a matrix ``[16, C]``, 512 columns a step."""
    row = tl.arange(0, 16)
    width: tl.constexpr = 512 // packed(FORMAT)
    s_ptrs = scale_pointers(scale_ptr, tl.program_id(0), 16, C, row, FORMAT, GROUP, 512)
    w_ptrs = w_ptr + row[:, None] * (C // packed(FORMAT)) + tl.arange(0, width)[None, :]
    mask = tl.full([16, 1], True, tl.int1)
    for k in range(0, C, 512):
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        w = load_weights(w_ptrs, s_ptrs, mask, k, C, dtype, FORMAT, GROUP, True)
        tl.store(out_ptr + row[:, None] * C + k + tl.arange(0, 512)[None, :], w)
        w_ptrs += width


def load(weight, scale, name, dtype, capability=90):
    """Weights [1, 16, C] as the kernels read them, ``[16, C]``."""
    stored = matrices(weight, scale, None, name, capability)
    out = torch.empty(16, stored.depth, dtype=dtype)
    _load_kernel[(1,)](stored.weight, stored.scale, out, stored.depth, **stored.constexprs)
    return out


def assert_same(got, expected):
    """Bit for bit, but that a NaN is a NaN."""
    expected = expected.view(got.shape)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_code_and_scale_of_mxfp4(dtype):
    """Every byte under every scale, NaN included."""
    weight = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 256)[None]
    scale = torch.arange(256, dtype=torch.uint8).expand(1, 16, 256).contiguous()
    assert_same(load(weight, scale, "mxfp4", dtype), dequantize(weight, scale, "mxfp4", dtype))


@pytest.mark.parametrize("capability", [80, 90], ids=["by integers", "by the instruction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_code_of_fp8(dtype, capability):
    """The interpreter's stand-in for the instruction takes NaN for a number."""
    weight = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 32)[None]
    weight = weight.view(torch.float8_e4m3fn)
    if capability == 90:
        weight = torch.where(weight.float().isnan(), 0.0, weight.float()).to(weight.dtype)
    scale = torch.tensor([[[0.0, 1.0, 3e-7, 7e35]]])
    got = load(weight, scale, "fp8_block", dtype, capability)
    assert_same(got, dequantize(weight, scale, "fp8_block", dtype))


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_code_of_integers(dtype, name):
    weight = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 64)[None]
    weight = weight.view(torch.int8) if name == "int8" else weight
    scales = torch.tensor([0.0, 1.0, -2.0, 0.0101, 3e-8, 1e4, 3e38, float("nan")])
    groups = (1024 if name == "int8" else 2048) // 32
    scale = scales.bfloat16().repeat(groups // 8).expand(1, 16, groups).contiguous()
    assert_same(load(weight, scale, name, dtype), dequantize(weight, scale, name, dtype))


def test_fp8_by_integers(monkeypatch):
    """Where there is no instruction, weights are given as bytes."""
    monkeypatch.setattr(layer, "device_of", lambda device: A100)
    for T in (1, 2):
        check(*quantised_case("fp8_block", T, 1, 1, 135, 69))


def test_blocks_of_ggml_are_refused():
    stored, _ = quantised_case("q8_0", 2, 1, 2, 64, 64)
    with pytest.raises(NotImplementedError, match="got q8_0: GGUF's blocks are for a CPU"):
        stored.run(fused_experts_triton)
