"""Child of test_linear_static.py: compiles the products of real models for three architectures.

Needs no GPU. One JSON line a kernel.
"""

import json
import re

import torch
from code_facts import ACCESS, COPY, compiled, resources
from compile_child import DEVICES

from moesd_kernels.dense.triton.linear_config import Product, linear_tiles
from moesd_kernels.dense.triton.linear_kernel import PLAIN, _linear_kernel
from moesd_kernels.experts.triton.common import ACTIVATIONS

# N, K, activation: Qwen3-30B's q, k, v; Qwen2-0.5B's down projection, gate and up.
SHAPES = {
    "not split": (5120, 2048, PLAIN),
    "split": (896, 4864, PLAIN),
    "gated": (9728, 896, ACTIVATIONS["silu"]),
}
# Lowest and highest tiles, and on Hopper all.
TOKENS = {80: (1, 64), 90: (1, 32, 64, 160), 100: (1, 32)}
TYPES = {"partial_ptr": "*fp32", "arrived_ptr": "*i32"}
# What the launcher finds out by itself: multiples of 16, all but the number of tokens.
ODD = {"T"}


def jobs(arch):
    """Distinct (constexprs, options, dtype) of all shapes and numbers of tokens."""
    found = {}

    def add(N, K, activation, T, dtype=torch.bfloat16, **flags):
        tile = linear_tiles(Product(T, N, K, dtype), DEVICES[arch])
        constexprs = {"ACTIVATION": activation, "HAS_BIAS": False, "EVEN_K": True}
        constexprs |= {"GROUP_M": tile.group_m, "PARTS": tile.split_k, "PDL": arch >= 90}
        job = constexprs | tile.constexprs() | flags, tile.options(), dtype
        found.setdefault(str(job), job)

    for T in TOKENS[arch]:
        add(*SHAPES["not split"], T)
        if T in (1, 160):
            add(*SHAPES["split"], T)
    if arch >= 90:
        add(*SHAPES["gated"], 1)
    if arch == 90:
        add(*SHAPES["gated"], 160)
        add(*SHAPES["split"], 5, HAS_BIAS=True, EVEN_K=False)
        add(*SHAPES["split"], 5, dtype=torch.float16)
        add(*SHAPES["split"], 40, dtype=torch.float32)
    return list(found.values())


def compile_one(arch, constexprs, options, dtype):
    """Compile one kernel; what its code and resource usage say."""
    number = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]

    def type_of(name):
        return TYPES.get(name, number if name.endswith("_ptr") else "i32")

    done = compiled(
        _linear_kernel, arch, constexprs, options, type_of, lambda name: name not in ODD
    )
    ptx = done.asm["ptx"]
    return {
        "arch": arch,
        "constexprs": constexprs | options | {"dtype": str(dtype)},
        "shared": done.metadata.shared,
        "shared_limit": DEVICES[arch].shared_bytes,
        "copy_bytes": sorted({int(size, 0) for size in re.findall(COPY, ptx)}),
        "mma": sorted(set(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx))),
        "early": sorted(set(re.findall(ACCESS, ptx.partition("griddepcontrol.wait")[0]))),
        **resources(done.asm["cubin"]),
    }


def main():
    for arch in sorted(DEVICES):
        for job in jobs(arch):
            print(json.dumps(compile_one(arch, *job)), flush=True)


if __name__ == "__main__":
    main()
