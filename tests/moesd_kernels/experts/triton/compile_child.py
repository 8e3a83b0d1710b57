"""Child of test_static.py: compiles every selectable kernel for one architecture, prints facts.

Run as ``python compile_child.py {80,90,100,variants,candidates}``; needs no GPU. One JSON line a
kernel.
"""

import itertools
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from code_facts import ACCESS, COPY, compiled, resources

from bench.tuning.search import CANDIDATES, search_steps
from moesd_kernels.experts.triton.combine_kernel import _combine_kernel
from moesd_kernels.experts.triton.combine_norm import _combine_norm_kernel
from moesd_kernels.experts.triton.config import model_choice, select_config
from moesd_kernels.experts.triton.down_kernel import _down_kernel
from moesd_kernels.experts.triton.formats import NUMBERS, stored_bits
from moesd_kernels.experts.triton.gate_up_kernel import _gate_up_kernel
from moesd_kernels.experts.triton.layer import MAX_PAIRS
from moesd_kernels.experts.triton.plan_kernel import _plan_kernel, plan_sizes
from moesd_kernels.experts.triton.single_kernel import _down_combine_kernel, _gate_up_single_kernel
from moesd_kernels.experts.triton.types import A100, B200, H200, LayerShape

DEVICES = {80: A100, 90: H200, 100: B200}
LAYERS = {
    "mixtral": (8, 2, 4096, 14336),
    "qwen2-57b": (64, 8, 3584, 2560),
    "qwen3-30b": (128, 8, 2048, 768),
    "olmoe": (64, 8, 2048, 1024),
    "deepseek-v3": (256, 8, 7168, 2048),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KERNELS = {
    "gate_up": _gate_up_kernel,
    "down": _down_kernel,
    "gate_up_single": _gate_up_single_kernel,
    "down_combine": _down_combine_kernel,
    "plan": _plan_kernel,
    "combine": _combine_kernel,
    "combine_norm": _combine_norm_kernel,
}
# Everything not named here is a bf16 pointer or an int32; K is contiguous.
TYPES = {
    "ids_ptr": "*i64",
    "sorted_to_pair_ptr": "*i32",
    "blocks_ptr": "*i32",
    "partial_ptr": "*fp32",
    "weights_ptr": "*fp32",
    "limit": "fp32",
    "alpha": "fp32",
    "eps": "fp32",
}
# Multiples of 16 in every real model, as the launcher finds out by itself.
DIVISIBLE = ("H", "I", "stride_xt", "stride_we", "stride_wn", "stride_be", "stride_ot")
# Of a launch that finds its rows in tables; none of them changes a tile.
SIZES = {"TOPK": 8, "N_PAD": 0, "E_PAD": 0, "CHUNKS": 0, "SPLIT_K": 1, "ROUTING": 0}
# Of one that finds them by itself: one value, the largest that tuning may ask for.
INLINE = SIZES | {"N_PAD": 1024, "E_PAD": 512, "CHUNKS": 1}
PLAIN = {
    "ACTIVATION": 0,
    "GATED": True,
    "INTERLEAVED": False,
    "HAS_BIAS": False,
    "HAS_LIMIT": False,
    "HAS_ALPHA": False,
    "EVEN_K": True,
    "stride_wk": 1,
    "FORMAT": NUMBERS["plain"],
    "GROUP": 1,
    "scale_ptr": None,
}


def key(kernel, constexprs, options):
    """What a job's code depends on."""
    return kernel, tuple(sorted(constexprs.items())), tuple(sorted(options.items()))


def jobs(arch):
    """Distinct (kernel, constexprs, options) over all layers, tokens and both modes."""
    found = {}

    def add(*job):
        found.setdefault(key(*job), job)

    for E, K, H, I in LAYERS.values():
        for T in TOKENS:
            for invariant in (False, True):
                shape = LayerShape(E, K, H, I, T)
                chosen = select_config(
                    shape, torch.bfloat16, DEVICES[arch], batch_invariant=invariant
                )
                if T == 1 and not invariant:
                    add("gate_up_single", *single(chosen.single_gate_up))
                    add("down_combine", *single(chosen.single_down))
                    continue
                gate_up, down = chosen.gate_up, chosen.down
                pairs = T * K
                routing = 2 if T == 1 else 1 if pairs <= chosen.inline_pairs else 0
                sizes = (INLINE if routing == 1 else SIZES) | {"ROUTING": routing}
                add("gate_up", sizes | gate_up.constexprs(), gate_up.options())
                split = {"SPLIT_K": down.split_k, "ROUTING": 2 if T == 1 else 0}
                add("down", SIZES | split | down.constexprs(), down.options())
    for pairs, warps in ((1024, 4), (2048, 4), (MAX_PAIRS, 8)):
        add("plan", plan_sizes(pairs, 300) | {"BLOCK_M": 64}, {"num_warps": warps})
    for split in (1, 8):
        add("combine", {"TOPK": 8, "SPLIT_K": split, "BLOCK_H": 512}, {"num_warps": 2})
    for shared in (False, True):
        sizes = {"TOPK": 8, "SPLIT_K": 1, "SUMMED": False, "SHARED": shared, "BLOCK_H": 4096}
        add("combine_norm", sizes, {"num_warps": 8})
    # Of one token, whose experts' outputs are combined already.
    add("combine_norm", sizes | {"SUMMED": True, "partial_ptr": "*bf16"}, {"num_warps": 8})
    return [*found.values(), *quantised_jobs(arch)]


# Layers whose weights are quantised: sizes, format, group and the types of weights and scales.
QUANTISED = (
    ((128, 8, 2048, 768), "fp8_block", 128, "*fp8e4nv", "*fp32"),  # Qwen3-30B
    ((32, 4, 2880, 2880), "mxfp4", 32, "*u8", "*u8"),  # gpt-oss-20b
    ((8, 2, 4096, 14336), "int4", 64, "*u8", "*bf16"),  # Mixtral
    ((8, 2, 4096, 14336), "int8", 128, "*i8", "*bf16"),
)
# What is compiled of which; int8 and one token's kernels on Hopper only.
QUANTISED_TOKENS = {"gate_up": (16, 64, None, None), "down": (None, None, 320, 64)}


def quantised_jobs(arch):
    """A few (kernel, constexprs, options) of each format; every one takes as long as a plain one.

    Before Hopper's generation E4M3 codes are bytes to the kernels.
    """
    gpt_oss = {"INTERLEAVED": True, "HAS_LIMIT": True, "HAS_ALPHA": True, "EVEN_K": False}
    for place, (layer, name, group, weight, scale) in enumerate(
        QUANTISED[: 4 if arch == 90 else 3]
    ):
        types = {"w_ptr": "*u8" if arch < 90 and name == "fp8_block" else weight}
        types |= {"scale_ptr": scale, "FORMAT": NUMBERS[name], "GROUP": group}
        types |= gpt_oss if name == "mxfp4" else {}
        for kernel, tokens in QUANTISED_TOKENS.items():
            if tokens[place] is not None:
                shape = LayerShape(*layer, tokens[place], weight_bits=(stored_bits(name),) * 2)
                tile = getattr(select_config(shape, torch.bfloat16, DEVICES[arch]), kernel)
                yield kernel, SIZES | types | tile.constexprs(), tile.options()
        if arch == 90 and name in ("fp8_block", "mxfp4"):
            shape = LayerShape(*layer, 1, weight_bits=(stored_bits(name),) * 2)
            chosen = select_config(shape, torch.bfloat16, DEVICES[arch])
            for kernel, tile in (
                ("gate_up_single", chosen.single_gate_up),
                ("down_combine", chosen.single_down),
            ):
                constexprs, options = single(tile)
                yield kernel, types | constexprs, options


def candidate_jobs():
    """What tuning may try on sm_90 beside the selector's choices, which ``jobs`` has."""
    chosen, found = {key(*job) for job in jobs(90)}, {}
    for layer, T in itertools.product(LAYERS.values(), TOKENS):
        shape = LayerShape(*layer, T)
        start = model_choice(shape, torch.bfloat16, H200)
        for name, step in search_steps(shape, torch.bfloat16, H200, CANDIDATES):
            for config in step(start):
                tile = getattr(config, name)
                if name.startswith("single") and tile:
                    kernel = name.replace("single_gate_up", "gate_up_single")
                    kernel = kernel.replace("single_down", "down_combine")
                    job = (kernel, *single(tile))
                elif name in ("gate_up", "down") and tile.block_m > 16:
                    # 16 rows are the code of 32 with half the accumulators.
                    job = (name, SIZES | tile.constexprs(), tile.options())
                else:
                    continue
                if key(*job) not in chosen:
                    found.setdefault(key(*job), job)
    return list(found.values())


def single(tile):
    """(constexprs, options) of a one-token tile."""
    constexprs = {"TOPK": 8, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return constexprs | {"STAGES": tile.num_stages}, {"num_warps": tile.num_warps}


# Layouts, gates and dtypes the interpreter accepts more readily than the compiler: name -> values.
# A type replaces an argument's; "odd" takes the divisibility away.
VARIANTS = {
    "bias": {"HAS_BIAS": True},
    "interleaved": {"INTERLEAVED": True, "HAS_BIAS": True},
    "transposed": {"stride_wn": 1, "stride_wk": "i32"},
    "gpt-oss": {
        "stride_wn": 1,
        "stride_wk": "i32",
        "INTERLEAVED": True,
        "HAS_BIAS": True,
        "HAS_LIMIT": True,
        "HAS_ALPHA": True,
    },
    "no gate": {"GATED": False, "ACTIVATION": 3},
    "gelu_tanh": {"ACTIVATION": 1},
    "gelu": {"ACTIVATION": 2},
    "odd": {"odd": True, "EVEN_K": False},
    "int32 ids": {"ids_ptr": "*i32", "weights_ptr": "*bf16"},
    "fp16": {"float": "*fp16"},
    "fp32": {"float": "*fp32", "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32},
    "swap_ab": {"SWAP_AB": True, "BLOCK_N": 64},
}


def variant_jobs():
    """Each variant of each kernel once, on a tile of middling size."""
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "SWAP_AB": False}
    sizes = {"TOPK": 4, "N_PAD": 128, "E_PAD": 32, "CHUNKS": 1}
    for name, values in VARIANTS.items():
        options = {"num_warps": 4, "num_stages": 3}
        common = {"variant": name} | sizes | tile
        yield "gate_up", common | {"ROUTING": 1} | values, options
        yield "down", common | {"ROUTING": 0, "SPLIT_K": 2} | values, options
        if values.get("stride_wk"):
            continue  # one token's kernels take contiguous rows only
        one_token = {"TOPK": 1, "BLOCK_N": 16, "BLOCK_K": 128 if name == "fp32" else 256}
        for kernel in ("gate_up_single", "down_combine"):
            yield kernel, {"variant": name} | values | one_token | {"STAGES": 4}, {"num_warps": 4}
        if name in ("odd", "int32 ids", "fp16", "fp32"):
            yield "combine", common | {"SPLIT_K": 2, "BLOCK_H": 512} | values, {"num_warps": 2}
    yield "plan", sizes | {"BLOCK_M": 16, "ids_ptr": "*i32", "variant": "int32 ids"}, {}


def compile_one(arch, kernel, constexprs, options):
    """Compile one kernel; what its code and resource usage say."""
    function = KERNELS[kernel]
    values = PLAIN | {"PDL": arch >= 90} | constexprs

    def type_of(name):
        number = values.get("float", "*bf16") if name.endswith("_ptr") else "i32"
        return values.get(name, TYPES.get(name, number))

    def is_divisible(name):
        return name.endswith("_ptr") or (name in DIVISIBLE and not values.get("odd"))

    done = compiled(function, arch, values, options, type_of, is_divisible)
    ptx = done.asm["ptx"]
    return {
        "kernel": kernel,
        "constexprs": constexprs | options,
        "shared": done.metadata.shared,
        "shared_limit": DEVICES[arch].shared_bytes,
        "bytewise": "evict_first" in "".join(re.findall(r"ld\.global\S*\.b8", ptx)),
        "copy_bytes": sorted({int(size, 0) for size in re.findall(COPY, ptx)}),
        "mma": sorted(set(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx))),
        "dependent_launch": "griddepcontrol.wait" in ptx,
        "early": sorted(set(re.findall(ACCESS, ptx.partition("griddepcontrol.wait")[0]))),
        **resources(done.asm["cubin"]),
    }


def main():
    what = {"variants": variant_jobs, "candidates": candidate_jobs}.get(sys.argv[1])
    arch = 90 if what else int(sys.argv[1])
    work = list(what()) if what else jobs(arch)
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for facts in pool.map(compile_one, [arch] * len(work), *zip(*work, strict=True)):
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
