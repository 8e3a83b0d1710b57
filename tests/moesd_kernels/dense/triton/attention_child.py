"""Child of test_attention_static.py: compiles ragged attention for three architectures, no GPU.

One JSON line a kernel.
"""

import json
import re

import torch
from code_facts import COPY, code_facts, compiled
from compile_child import DEVICES

from moesd_kernels.dense.triton.attention import NUM_WARPS, UNROLL, num_stages, tile_of
from moesd_kernels.dense.triton.attention_kernel import _attend_kernel, _combine_blocks_kernel

KERNELS = {"attend": _attend_kernel, "combine": _combine_blocks_kernel}
# Everything not named here is a pointer to the job's dtype or an int32.
TYPES = {
    "positions_ptr": "*i64",
    "rows_ptr": "*i64",
    "stats_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "scale": "fp32",
}


def attend(arch, dtype, split, group=8, width=128):
    block_m, block_n = tile_of(torch.bfloat16, width)
    stages = num_stages(block_m, block_n, 2 * width, DEVICES[arch].shared_bytes)
    constexprs = {
        "GROUP": group,
        "D": width,
        "DV": width,
        "HAS_ROWS": True,
        "HAS_SINKS": not split,
        "SPLIT": split,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": width,
        "BLOCK_DV": width,
    }
    return arch, "attend", dtype, constexprs, {"num_warps": NUM_WARPS, "num_stages": stages}


def jobs():
    """(arch, kernel, dtype, constexprs, options); the number of queries changes no code."""
    sizes = {"DV": 128, "BLOCK_DV": 128, "BLOCK_N": 128, "UNROLL": UNROLL, "HAS_SINKS": True}
    for arch in (80, 90, 100):
        yield attend(arch, "bf16", True)
        yield attend(arch, "bf16", False)
        yield arch, "combine", "bf16", sizes, {"num_warps": 1}
    yield attend(90, "fp16", True, group=4)
    yield attend(90, "bf16", False, width=256)


def compile_one(arch, name, dtype, constexprs, options):
    """Compile one kernel; what its code and resource usage say."""
    function = KERNELS[name]
    values = {"PDL": arch >= 90} | constexprs
    types = TYPES | ({"out_ptr": "*fp32"} if values.get("SPLIT") else {})

    def type_of(name):
        return types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

    def is_divisible(name):  # in every real model, as the launcher finds out by itself
        return name.endswith("_ptr") or name.startswith("stride")

    done = compiled(function, arch, values, options, type_of, is_divisible)
    ptx = done.asm["ptx"]
    return {
        **code_facts(arch, name, f"{dtype} {constexprs}", done, options["num_warps"]),
        "split": bool(values.get("SPLIT")),
        "shared": done.metadata.shared,
        "shared_limit": DEVICES[arch].shared_bytes,
        "copy_bytes": sorted({int(size, 0) for size in re.findall(COPY, ptx)}),
        "mma": sorted(set(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx))),
        "reductions": row_reductions(done.asm["ttgir"]),
    }


def row_reductions(ttgir):
    """How the tiles that are reduced to one fp32 value a row lie in registers."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    found = re.findall(r"\}\) : \(tensor<(\d+x\d+xf32), (#\w+)>\)", ttgir)
    return [f"{shape} {layouts[name]}" for shape, name in found]


def main():
    for job in jobs():
        print(json.dumps(compile_one(*job)), flush=True)


if __name__ == "__main__":
    main()
