"""Child of test_static.py: compiles the recurrent layers' kernels without a GPU.

One JSON line a kernel.
"""

from code_facts import code_facts, compiled, print_facts

from moesd_kernels.dense.triton.recurrent import (
    convolution_kernel,
    delta_rule_kernel,
    gated_norm_kernel,
    launch,
    state_space_kernel,
)

KERNELS = {
    "delta_rule": delta_rule_kernel._delta_rule_kernel,
    "state_space": state_space_kernel._state_space_kernel,
    "convolution": convolution_kernel._convolution_kernel,
    "gated_norm": gated_norm_kernel._gated_norm_kernel,
}
# Everything not named here is a pointer to the job's dtype or an int32.
TYPES = dict.fromkeys(("rows_ptr", "keep_ptr", "counts_ptr"), "*i64") | {
    "scale": "fp32",
    "eps": "fp32",
}
FLOATS = ("decay", "beta", "states", "dt", "a", "d")
TYPES |= {f"{name}_ptr": "*fp32" for name in FLOATS}
UNSPECIALIZED = {name for kernel in KERNELS.values() for name in kernel.do_not_specialize or ()}
# Qwen3-Next; Nemotron-H; Jamba's channels.
DELTA = {"HV": 32, "GROUP": 2, "DK": 128, "DV": 128, "DK_PAD": 128, "BLOCK_V": 32}
MAMBA2 = {"H": 128, "GROUP": 16, "P": 64, "N": 128, "N_PAD": 128, "BLOCK_P": 16}
MAMBA = {"H": 1, "GROUP": 1, "P": 8192, "N": 16, "N_PAD": 16, "BLOCK_P": 128}
GATED_NORM = {"GATE_FIRST": False, "CAST_FIRST": True, "W_OF_GROUP": True, "SIGMOID": False}
CONVOLUTION = {"HAS_BIAS": True, "ACTIVATION": 0, "BLOCK": convolution_kernel.BLOCK}


def every_arch():
    """(kernel, dtype, constexprs) of the models' sizes in bf16."""
    yield "delta_rule", "bf16", DELTA | {"PER_CHANNEL": False}
    yield "delta_rule", "bf16", DELTA | {"PER_CHANNEL": True}
    yield "state_space", "bf16", MAMBA2 | {"PER_CHANNEL": False}
    yield "state_space", "bf16", MAMBA | {"PER_CHANNEL": True}
    yield "convolution", "bf16", CONVOLUTION | {"TAPS": 4}
    yield "gated_norm", "bf16", GATED_NORM | {"GROUP": 128, "BLOCK": 128}


def hopper_alone():
    """Limits and other dtypes."""
    widest = {"DK": 576, "DK_PAD": 1024, "BLOCK_V": 8}
    yield "delta_rule", "fp32", DELTA | widest | {"PER_CHANNEL": True}
    yield (
        "state_space",
        "fp16",
        MAMBA2 | {"N": 512, "N_PAD": 512, "BLOCK_P": 8, "PER_CHANNEL": False},
    )
    yield "convolution", "fp32", CONVOLUTION | {"TAPS": 3, "HAS_BIAS": False, "ACTIVATION": -1}
    rule = {"GATE_FIRST": True, "CAST_FIRST": False, "W_OF_GROUP": False, "SIGMOID": True}
    yield "gated_norm", "fp32", rule | {"GROUP": gated_norm_kernel.MAX_GROUP, "BLOCK": 16384}


def compile_one(arch, name, dtype, constexprs):
    """Compile one kernel; what its code and resource usage say."""
    values = {"PDL": arch >= 90} | constexprs
    warps = launch.NUM_WARPS
    if name == "gated_norm":
        warps = gated_norm_kernel.warps_of(constexprs["BLOCK"])

    def type_of(argument):
        return TYPES.get(argument, f"*{dtype}" if argument.endswith("_ptr") else "i32")

    def is_divisible(argument):
        return argument not in UNSPECIALIZED and TYPES.get(argument) != "fp32"

    done = compiled(KERNELS[name], arch, values, {"num_warps": warps}, type_of, is_divisible)
    return code_facts(arch, name, f"{dtype} {constexprs}", done, warps)


if __name__ == "__main__":
    print_facts(compile_one, every_arch, hopper_alone)
