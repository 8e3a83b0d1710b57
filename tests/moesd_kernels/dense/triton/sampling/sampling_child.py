"""Child of test_static.py: compiles the sampler's kernels without a GPU. One JSON line a kernel."""

from code_facts import code_facts, compiled, print_facts

from moesd_kernels.dense.triton.sampling import (
    accept_kernel,
    probs_kernel,
    race_kernel,
    residual_kernel,
    verdict_kernel,
)

V = 151936
KERNELS = {
    "probs": probs_kernel._probs_kernel,
    "race": race_kernel._race_part_kernel,
    "mass": accept_kernel._mass_kernel,
    "accept": accept_kernel._accept_kernel,
    "residual": residual_kernel._residual_part_kernel,
    "join": residual_kernel._residual_join_kernel,
    "agree": verdict_kernel._agree_kernel,
}
# Everything not named here is a pointer to fp32 or an int32.
LONG = ("rows", "seeds", "rounds", "positions", "top_k", "tokens")
LONG += ("lengths", "counts", "keys", "accepted", "own")
TYPES = {f"{name}_ptr": "*i64" for name in LONG}
TYPES |= dict.fromkeys(("undefined_ptr", "greedy_ptr", "rejected_ptr"), "*i1")
TYPES |= {"orders_ptr": "*i32", "places_ptr": "*i32", "masses_ptr": "*fp64"}
EXACT = {"enable_fp_fusion": False}
RACE_BLOCK, MASS_BLOCK = race_kernel.BLOCK, accept_kernel.BLOCK
RACE = {"BLOCK": RACE_BLOCK}
RACE_OPTIONS = {"num_warps": race_kernel.NUM_WARPS}
PROBS = {"SCALE": 2.0**44, "BLOCK": probs_kernel.BLOCK}
ACCEPT = {"HAS_UNDEFINED": True, "PARTS": -(-V // MASS_BLOCK), "PARTS_PAD": 64, "G_PAD": 8}
JOIN = {"PARTS": -(-V // RACE_BLOCK), "PARTS_PAD": 128, "G_PAD": 8}
NONE = {"draft_ptr": None, "masses_ptr": None}


def every_arch():
    """(kernel, constexprs, options, logits' dtype)."""
    yield "probs", PROBS, {"num_warps": probs_kernel.NUM_WARPS}, "bf16"
    yield "race", RACE | {"STREAM": 0, "HAS_ROUNDS": True}, RACE_OPTIONS, ""
    options = {"num_warps": accept_kernel.NUM_WARPS} | EXACT
    yield "mass", {"BLOCK": MASS_BLOCK}, options, ""
    yield "accept", ACCEPT | {"BY_BLOCK": True, "HAS_DRAFT": True}, {"num_warps": 1} | EXACT, ""
    yield "residual", RACE | {"HAS_DRAFT": True}, RACE_OPTIONS | EXACT, ""
    yield "join", JOIN, {"num_warps": 1}, ""
    yield "agree", {"G_PAD": 8}, {"num_warps": 1}, ""


def hopper_alone():
    """Other rules and drafts."""
    standard = {"BY_BLOCK": False, "masses_ptr": None, "HAS_UNDEFINED": False}
    standard |= {"HAS_DRAFT": True, "undefined_ptr": None}
    yield "accept", ACCEPT | standard, {"num_warps": 1} | EXACT, ""
    one_hot = NONE | {"HAS_DRAFT": False}
    yield "accept", ACCEPT | one_hot | {"BY_BLOCK": True}, {"num_warps": 1} | EXACT, ""
    yield "residual", RACE | {"draft_ptr": None, "HAS_DRAFT": False}, RACE_OPTIONS | EXACT, ""


def compile_one(arch, name, constexprs, options, dtype):
    """Compile one kernel; what its code and resource usage say."""
    types = TYPES | {"logits_ptr": f"*{dtype}"}
    if name in ("join", "agree"):
        types["out_ptr"] = "*i64"

    def type_of(argument):
        return types.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")

    def is_divisible(argument):
        return argument.endswith("_ptr") or argument in ("V", "stride_lr")

    values = {"PDL": arch >= 90} | constexprs
    done = compiled(KERNELS[name], arch, values, options, type_of, is_divisible)
    ptx = done.asm["ptx"]
    return {
        **code_facts(arch, name, f"{dtype} {constexprs}", done, options["num_warps"]),
        "fused": "fma.rn.f32" in ptx or "fma.rn.f64" in ptx,
        "approximate_log": "lg2.approx" in ptx,
    }


if __name__ == "__main__":
    print_facts(compile_one, every_arch, hopper_alone)
