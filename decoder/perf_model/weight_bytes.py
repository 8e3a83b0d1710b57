"""Bytes of memory that one weight takes in a format, its share of the scales included.

Written out here, where neither torch nor the kernels are needed; a test holds them to the formats.
"""

from __future__ import annotations

# int8 and int4 with a scale for 32 weights, as `moesd_kernels.quantize` makes them.
WEIGHT_BYTES = {
    "bf16": 2.0,
    "fp16": 2.0,
    "fp32": 4.0,
    "fp8": 1 + 4 / 128**2,
    "int8": 1 + 2 / 32,
    "int4": 1 / 2 + 2 / 32,
    "mxfp4": 1 / 2 + 1 / 32,
    "q8_0": 34 / 32,
    "q4_0": 18 / 32,
    "q4_1": 20 / 32,
    "q4_k": 144 / 256,
    "q6_k": 210 / 256,
}
EXPERTS_ONLY = frozenset({"mxfp4"})  # gpt-oss: the rest of the model has 16 bits
