"""Child of test_small_static.py: compiles norms, rope, activation, router and argmax, no GPU.

One JSON line a kernel.
"""

from code_facts import code_facts, compiled, print_facts

from moesd_kernels.dense.triton import activation_kernel, argmax_kernel
from moesd_kernels.dense.triton.activation_kernel import _act_kernel
from moesd_kernels.dense.triton.argmax_kernel import _argmax_join_kernel, _argmax_part_kernel
from moesd_kernels.dense.triton.norm_kernel import MAX_BLOCK, _norm_kernel
from moesd_kernels.dense.triton.norm_route_kernel import _norm_route_kernel
from moesd_kernels.dense.triton.rope_kernel import _rope_kernel
from moesd_kernels.dense.triton.router_kernel import _topk_kernel

KERNELS = {
    "norm": _norm_kernel,
    "rope": _rope_kernel,
    "act": _act_kernel,
    "topk": _topk_kernel,
    "norm_route": _norm_route_kernel,
    "part": _argmax_part_kernel,
    "join": _argmax_join_kernel,
}
# Everything not named here is a pointer to the job's dtype or an int32.
TYPES = {
    "index_ptr": "*i64",
    "ids_ptr": "*i64",
    "weights_ptr": "*fp32",
    "orders_ptr": "*i32",
    "places_ptr": "*i32",
    "undefined_ptr": "*i1",
    "eps": "fp32",
    "q_eps": "fp32",
    "k_eps": "fp32",
    "offset": "fp32",
}
NORM = {"HAS_DELTA": True, "CAST_FIRST": True}
ROPE = {"D": 128, "HALF_PAD": 64, "GROUP": 4, "HAS_Q_NORM": True, "HAS_K_NORM": True}
ROUTER = {"RENORMALIZE": True, "E": 128, "TOPK": 8, "E_PAD": 128, "K_PAD": 8}
ROUTE = ROUTER | {"H": 2048, "BLOCK": 2048, "BLOCK_K": 64}
ACT = {"BLOCK": activation_kernel.BLOCK, "ACTIVATION": 0}
ROPE_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
ACT_OPTIONS = {"num_warps": activation_kernel.NUM_WARPS}


def every_arch():
    """(kernel, dtype, constexprs, options) of the models' sizes in bf16."""
    yield "norm", "bf16", NORM | {"H": 3584, "BLOCK": 4096}, {"num_warps": 8}
    yield "rope", "bf16", ROPE | {"Q_HEADS": 28, "KV_HEADS": 4}, ROPE_OPTIONS
    yield "act", "bf16", ACT, ACT_OPTIONS
    yield "topk", "bf16", ROUTER, {"num_warps": 1}
    yield "norm_route", "bf16", ROUTE, {"num_warps": 8}
    yield "part", "bf16", {"BLOCK": argmax_kernel.BLOCK}, {"num_warps": argmax_kernel.NUM_WARPS}
    yield "join", "bf16", {"PARTS": 38, "PARTS_PAD": 64}, {"num_warps": 1}


def hopper_alone():
    """Limits, other dtypes and functions."""
    wide = NORM | {"BLOCK": MAX_BLOCK, "CAST_FIRST": False}
    yield "norm", "fp32", wide | {"H": MAX_BLOCK}, {"num_warps": 16}
    yield "norm", "bf16", wide | {"H": 20000}, {"num_warps": 16}
    one_head = {"D": 576, "HALF_PAD": 512, "GROUP": 1, "Q_HEADS": 16, "KV_HEADS": 1}
    yield "rope", "fp32", ROPE | one_head, ROPE_OPTIONS
    limits = {"E": 1024, "TOPK": 32, "E_PAD": 1024, "K_PAD": 32}
    yield "topk", "fp32", ROUTER | limits, {"num_warps": 1}
    most = limits | {"H": MAX_BLOCK, "BLOCK": MAX_BLOCK, "BLOCK_K": 16}
    yield "norm_route", "bf16", ROUTE | most, {"num_warps": 8}
    for activation in (1, 2):
        yield "act", "fp16", ACT | {"ACTIVATION": activation}, ACT_OPTIONS


def compile_one(arch, name, dtype, constexprs, options):
    """Compile one kernel; what its code and resource usage say."""
    function = KERNELS[name]
    values = {"PDL": arch >= 90} | constexprs

    def type_of(name):
        return TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

    def is_divisible(name):
        return TYPES.get(name) != "fp32" and name != "num_rows"

    done = compiled(function, arch, values, options, type_of, is_divisible)
    ptx = done.asm["ptx"]
    return {
        **code_facts(arch, name, f"{dtype} {constexprs}", done, options["num_warps"]),
        "fused": "fma.rn.f32" in ptx,
        "warp_reductions": ptx.count("redux.sync"),
    }


if __name__ == "__main__":
    print_facts(compile_one, every_arch, hopper_alone)
