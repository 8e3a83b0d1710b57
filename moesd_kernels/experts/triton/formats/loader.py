"""Weight tiles as a dot takes them: stored codes become numbers in the activations' dtype here.

A number is its format's value in fp32 arithmetic, rounded once, so that what a kernel multiplies
is bit for bit what it would load had the weights been dequantised before. The codes of four bits
are put together as bf16 numbers two at a time; steps that are exact in bf16 are rounded to it in
between, which costs no accuracy and lets the compiler use its packed instructions. Everything
happens in registers, in the layout of the matrix instruction's operand where it has one there.
Not run on a GPU yet.
"""

import triton
import triton.language as tl

from . import NUMBERS, SQUARE

_PLAIN = tl.constexpr(NUMBERS["plain"])
_FP8_BLOCK = tl.constexpr(NUMBERS["fp8_block"])
_MXFP4 = tl.constexpr(NUMBERS["mxfp4"])
_INT8 = tl.constexpr(NUMBERS["int8"])
_SQUARE = tl.constexpr(SQUARE)


@triton.constexpr_function
def packed(FORMAT):
    """Weights in a stored element."""
    return 2 if FORMAT in (NUMBERS["mxfp4"], NUMBERS["int4"]) else 1


@triton.jit
def scale_pointers(
    scale_ptr, e, R, C, row, FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Pointers [rows, groups of a step] to the scales of an expert's rows at column 0.

    Args:
        scale_ptr: [E, R, cdiv(C, GROUP)], or of square blocks [E, cdiv(R, GROUP), cdiv(C, GROUP)].
            None of plain weights: then what is returned is not to be read.
        row: rows of the expert's ``[R, C]`` matrix.
    """
    if FORMAT == _PLAIN:
        return row
    else:
        groups = tl.cdiv(C, GROUP)
        if FORMAT == _FP8_BLOCK:
            row = row // _SQUARE
            R = tl.cdiv(R, _SQUARE)
        scale_ptr += e.to(tl.int64) * R * groups
        STEP: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
        return scale_ptr + row[:, None] * groups + tl.arange(0, STEP)[None, :]


@triton.jit
def tile_pointers(
    w_ptr, first_n, rows, stride_wn, stride_wk, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Pointers [rows, stored elements of a step]; only the first row's offset can pass 2**31."""
    base = w_ptr + first_n.to(tl.int64) * stride_wn
    offs_w = tl.arange(0, BLOCK_K // packed(FORMAT))
    return base + rows[:, None] * stride_wn + offs_w[None, :] * stride_wk


@triton.jit
def load_weights(
    w_ptrs,  # [N, stored elements of a step]: of the step at k
    s_ptrs,  # [N, groups of a step]: of the step at 0; unused of plain weights
    w_mask,  # [N, 1]
    k,
    depth,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The weights ``[N, BLOCK_K]`` from column k on, in ``dtype``; zeros from ``depth`` on.

    Weights are loaded ``evict_first``, scales are not: a line of theirs serves several steps.
    """
    WIDTH: tl.constexpr = w_ptrs.shape[1]
    k_mask = tl.full([1, WIDTH], True, tl.int1)
    if not EVEN_K:
        at, end = k, depth
        if packed(FORMAT) > 1:  # whole groups: elements beyond the end are whole vectors
            at = tl.multiple_of(k // packed(FORMAT), min(16, WIDTH))
            end = tl.multiple_of(depth // packed(FORMAT), 16)
        k_mask = (at + tl.arange(0, WIDTH) < end)[None, :]
    w = tl.load(w_ptrs, mask=w_mask & k_mask, other=0.0, eviction_policy="evict_first")
    if FORMAT != _PLAIN:
        s_mask = w_mask
        if not EVEN_K:
            s_mask = w_mask & (k + tl.arange(0, s_ptrs.shape[1]) * GROUP < depth)[None, :]
        s = tl.load(s_ptrs + k // GROUP, mask=s_mask, other=0.0)
        w = _dequantize(w, s, FORMAT).to(dtype)
    return w


@triton.jit
def _dequantize(w, s, FORMAT: tl.constexpr):
    """Codes and scales of a step as fp32 numbers ``[N, BLOCK_K]``."""
    if FORMAT == _FP8_BLOCK:
        out = _scaled(_e4m3(w), s)
    elif FORMAT == _INT8:
        out = _scaled(w.to(tl.float32), s.to(tl.float32))
    elif FORMAT == _MXFP4:
        # Sign and magnitude in a bf16's bits are 2^-126 of the number: bf16 has E2M1's subnormal.
        w = w.to(tl.int32)
        pairs = ((w * 0x01001000) & -0x7FFF8000) | ((w * 0x00040040) & 0x01C001C0)
        # 2^126 times a large scale is no bf16, but the product of two that are.
        exponent = s.to(tl.int32) - 1
        half = exponent >> 1
        out = _scaled(_bf16_pairs(pairs), _bf16((half + 127) << 7)).to(tl.bfloat16).to(tl.float32)
        rest = tl.where(exponent == 254, 0x7FC0, (exponent - half + 127) << 7)  # E8M0's NaN
        out = _scaled(out, _bf16(rest))
    else:
        # The last four bits of bf16's 128 count by one.
        pairs = ((w.to(tl.int32) * 0x1001) & 0x000F000F) | 0x43004300
        out = (_bf16_pairs(pairs) - 136.0).to(tl.bfloat16).to(tl.float32)
        out = _scaled(out, s.to(tl.float32))
    return out


@triton.jit
def _scaled(numbers, s):
    """``[N, BLOCK_K]`` numbers times the scale of their group, s [N, groups]."""
    N: tl.constexpr = s.shape[0]
    GROUPS: tl.constexpr = s.shape[1]
    BLOCK_K: tl.constexpr = numbers.shape[1]
    grouped = tl.reshape(numbers, [N, GROUPS, BLOCK_K // GROUPS]) * s[:, :, None]
    return tl.reshape(grouped, [N, BLOCK_K])


@triton.jit
def _e4m3(code):
    """E4M3 codes, given as such or as bytes, in fp32."""
    if code.dtype == tl.float8e4nv:
        out = code.to(tl.float32)
    else:
        code = code.to(tl.int32)
        # In an fp32's bits they are 2^-120 of the number: fp32 has E4M3's subnormals.
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        out = bits.to(tl.float32, bitcast=True) * 2.0**120
        out = tl.where((code & 0x7F) == 0x7F, float("nan"), out)
    return out


@triton.jit
def _bf16(bits):
    """Numbers given by the low 16 of their bits, in fp32."""
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def _bf16_pairs(words):
    """Two bf16 numbers of every 32-bit word, the low half first, in fp32: ``[N, 2 * words]``."""
    return tl.interleave(_bf16(words), _bf16(words >> 16))
