"""FP8 with a scale per 128 x 128 block, and MXFP4: floating-point codes with floating-point scales.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3; OCP Microscaling Formats (MX)
v1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .description import BLOCK, WeightFormat
from .nibbles import unpack_nibbles

# The values of the sixteen E2M1 codes: bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MX_GROUP = 32


def decode_fp8_block(weight: Tensor, scale: Tensor | None) -> Tensor:
    """E4M3 values (0x7f and 0xff are NaN) times the scale of their 128 x 128 block.

    Args:
        weight: ``[..., R, C]`` float8_e4m3fn.
        scale: ``[..., ceil(R / 128), ceil(C / 128)]`` fp32 or bf16.

    Returns:
        ``[..., R, C]`` fp32.
    """
    assert scale is not None
    R, C = weight.shape[-2:]
    rows = scale.float().repeat_interleave(BLOCK, dim=-2)[..., :R, :]
    return weight.float() * rows.repeat_interleave(BLOCK, dim=-1)[..., :C]


def decode_mxfp4(weight: Tensor, scale: Tensor | None) -> Tensor:
    """E2M1 values times a power of two for every 32 of a row; the scale's code 255 is NaN.

    Args:
        weight: ``[..., R, C / 2]`` uint8, two codes a byte, the low nibble first.
        scale: ``[..., R, C / 32]`` uint8, 2^(code - 127).

    Returns:
        ``[..., R, C]`` fp32.
    """
    assert scale is not None
    values = torch.tensor(E2M1, device=weight.device)[unpack_nibbles(weight).int()]
    powers = scale.view(torch.float8_e8m0fnu).float()  # exact: the least is a subnormal of fp32
    return (values.unflatten(-1, (-1, _MX_GROUP)) * powers[..., None]).flatten(-2)


FP8_BLOCK = WeightFormat(
    "fp8_block",
    "FP8 E4M3, an fp32 scale for 128 x 128 weights (DeepSeek-V3, Qwen3-FP8)",
    decode_fp8_block,
    torch.float8_e4m3fn,
    scales="square",
    scale_dtype=torch.float32,
)
MXFP4 = WeightFormat(
    "mxfp4",
    "FP4 E2M1, a power of two for 32 weights (gpt-oss)",
    decode_mxfp4,
    torch.uint8,
    block=_MX_GROUP,
    stored=_MX_GROUP // 2,
    scales="fixed",
    scale_dtype=torch.uint8,
    integers=True,  # half integers, which is as well
)
