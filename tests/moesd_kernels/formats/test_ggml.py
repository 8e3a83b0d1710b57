"""GGUF's blocks: against loops over ggml's own description, and against the package ``gguf``."""

from __future__ import annotations

import math

import pytest
import torch

from moesd_kernels.formats import WEIGHT_FORMATS, dequantize

GGML = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")


def half(bytes_: list[int]) -> float:
    return torch.tensor(bytes_, dtype=torch.uint8).view(torch.float16).item()


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def block_values(name: str, b: list[int]) -> list[float]:
    """One block's weights as ``ggml-quants.c`` walks through it, in exact arithmetic."""
    if name == "q8_0":
        return [half(b[:2]) * signed(q) for q in b[2:]]
    if name == "q4_0":
        codes = [q & 15 for q in b[2:]] + [q >> 4 for q in b[2:]]
        return [half(b[:2]) * (q - 8) for q in codes]
    if name == "q4_1":
        codes = [q & 15 for q in b[4:]] + [q >> 4 for q in b[4:]]
        return [half(b[:2]) * q + half(b[2:4]) for q in codes]
    if name in ("q5_0", "q5_1"):
        minimum = half(b[2:4]) if name == "q5_1" else None
        return q5_values(half(b[:2]), minimum, b[-20:-16], b[-16:])
    if name == "q6_k":
        return q6_k_values(b)
    upper = b[16:48] if name == "q5_k" else [0] * 32
    return scaled_values(half(b[:2]), half(b[2:4]), b[4:16], upper, b[-128:])


def q5_values(d: float, m: float | None, fifth: list[int], codes: list[int]) -> list[float]:
    bits = int.from_bytes(fifth, "little")
    low = [q & 15 | (bits >> j & 1) << 4 for j, q in enumerate(codes)]
    high = [q >> 4 | (bits >> (j + 16) & 1) << 4 for j, q in enumerate(codes)]
    return [d * (q - 16) if m is None else d * q + m for q in low + high]


def scaled_values(
    d: float, least: float, packed: list[int], upper: list[int], codes: list[int]
) -> list[float]:
    """Of q4_k and q5_k."""

    def factor(j: int) -> tuple[int, int]:
        if j < 4:
            return packed[j] & 63, packed[j + 4] & 63
        return (
            (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4,
            (packed[j + 4] >> 4) | (packed[j] >> 6) << 4,
        )

    values = []
    for j in range(8):
        scale, minimum = factor(j)
        for bits, q in zip(upper, codes[j // 2 * 32 : j // 2 * 32 + 32], strict=True):
            code = (q >> 4 if j % 2 else q & 15) + 16 * (bits >> j & 1)
            values.append(d * scale * code - least * minimum)
    return values


def q6_k_values(b: list[int]) -> list[float]:
    lower, upper, scales, d = b[:128], b[128:192], b[192:208], half(b[208:])
    values = [0.0] * 256
    for n in (0, 1):  # halves of the block
        for i in range(32):
            high = upper[n * 32 + i]
            quarters = (
                (lower[n * 64 + i] & 15) | (high & 3) << 4,
                (lower[n * 64 + i + 32] & 15) | (high >> 2 & 3) << 4,
                (lower[n * 64 + i] >> 4) | (high >> 4 & 3) << 4,
                (lower[n * 64 + i + 32] >> 4) | (high >> 6) << 4,
            )
            for quarter, q in enumerate(quarters):
                scale = signed(scales[n * 8 + i // 16 + 2 * quarter])
                values[n * 128 + quarter * 32 + i] = d * scale * (q - 32)
    return values


def random_rows(name: str, rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Rows of random bytes, whose fp16 numbers are finite."""
    stored = WEIGHT_FORMATS[name]
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(256, (rows, blocks, stored.stored), generator=g, dtype=torch.uint8)
    minima = dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (1, 3))
    for at in (minima | {"q6_k": (209,)}).get(name, (1,)):
        weight[..., at] &= 0xBF  # below 2: an exponent without its highest bit
    return weight.flatten(1)


@pytest.mark.parametrize("name", GGML)
def test_blocks_are_read_as_ggml_reads_them(name):
    weight = random_rows(name, 3, 2)
    stored = WEIGHT_FORMATS[name].stored
    expected = [
        [v for start in (0, stored) for v in block_values(name, row[start : start + stored])]
        for row in weight.tolist()
    ]
    exact = torch.tensor(expected, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(weight, None, name, dtype), exact.float().to(dtype))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_every_code_of_a_block(name):
    """A block whose scale is 1 (and minimum 0) shows the codes themselves.

    In the large blocks scales of their own take part; the test above has all of that.
    """
    one = list(torch.ones(1, dtype=torch.float16).view(torch.uint8))
    codes = torch.arange(256, dtype=torch.uint8)
    if name == "q8_0":
        block = torch.cat([torch.tensor(one * 8).view(8, 2), codes.view(8, 32)], dim=1)
        expected = codes.view(torch.int8).float()
    else:
        head = torch.tensor((one + [0, 0] * (name == "q4_1")) * 16).view(16, -1)
        block = torch.cat([head, codes.view(16, 16)], dim=1)
        nibbles = torch.cat([codes.view(16, 16) & 15, codes.view(16, 16) >> 4], dim=1)
        expected = nibbles.float().flatten() - (8 if name == "q4_0" else 0)
    block = block.to(torch.uint8).reshape(1, -1)
    assert torch.equal(dequantize(block, None, name, torch.float32)[0], expected)


@pytest.mark.parametrize("value", [0.0, -0.0, 65504.0, 6e-8, math.inf, math.nan])
@pytest.mark.parametrize("name", GGML)
def test_extreme_scales(name, value):
    """fp32 arithmetic of the definition, also with scales that no quantiser writes."""
    weight = random_rows(name, 1, 1)
    bytes_ = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    at = 208 if name == "q6_k" else 0
    weight[0, at : at + 2] = bytes_
    exact = torch.tensor([block_values(name, weight[0].tolist())], dtype=torch.float64).float()
    actual = dequantize(weight, None, name, torch.float32)
    assert torch.equal(actual.nan_to_num(nan=1e30), exact.nan_to_num(nan=1e30))


@pytest.mark.parametrize("name", GGML)
def test_the_package_gguf_reads_the_same(name):
    gguf = pytest.importorskip("gguf")
    weight = random_rows(name, 4, 3, seed=1)
    theirs = gguf.dequantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(dequantize(weight, None, name, torch.float32), torch.from_numpy(theirs))


def test_rows_may_start_anywhere():
    """Experts' rows are slices of larger tensors, at odd bytes as well."""
    weight = random_rows("q6_k", 2, 1)
    moved = torch.zeros(2 * 210 + 1, dtype=torch.uint8)
    moved[1:] = weight.flatten()
    again = dequantize(moved[1:].view(2, 1, 210), None, "q6_k", torch.float32)
    assert torch.equal(again[:, 0], dequantize(weight, None, "q6_k", torch.float32))
