"""Kernels compiled without a GPU, and what their code says, for the children that compile them."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

COPY = r"cp\.async\.c[ag]\.shared\.global[^\[]*\[[^\]]*\], *\[[^\]]*\], *(0x\w+|\d+)"
ACCESS = r"\b(prefetch|ld|st|atom|red|cp\.async)\.\S*global"


def compiled(function, arch, values, options, type_of, is_divisible):
    """A kernel compiled for ``sm_<arch>``: arguments are constants of ``values``, or of a type."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in values and not isinstance(values[name], str):
            signature[name], constants[(index,)] = "constexpr", values[name]
            continue
        signature[name] = type_of(name)
        if is_divisible(name):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def code_facts(arch, kernel, case, done, num_warps):
    """What the code of a compiled kernel says, whatever the kernel does."""
    ptx = done.asm["ptx"]
    loads = re.findall(r"ld\.global\S*?\.v(\d)\.b32", ptx)
    return {
        "arch": arch,
        "kernel": kernel,
        "case": case,
        "widest_load": max(map(int, loads), default=1),
        "dependent_launch": "griddepcontrol.wait" in ptx,
        "early": sorted(set(re.findall(ACCESS, ptx.partition("griddepcontrol.wait")[0]))),
        "threads": 32 * num_warps,
        **resources(done.asm["cubin"]),
    }


def resources(cubin):
    """Registers, and bytes of stack and local memory: what a spill would use."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {name.lower(): int(found[name]) for name in ("REG", "STACK", "LOCAL")}


def print_facts(compile_one, every_arch, hopper_alone):
    """A line of JSON for each job ``(kernel, dtype, constants)``, compiled for its architectures.

    Args:
        compile_one: ``(arch, *job)`` to facts.
        every_arch: the jobs for all of them; ``hopper_alone``: those for sm_90.
    """
    work = [(arch, *job) for arch in (80, 90, 100) for job in every_arch()]
    for job in [*work, *((90, *job) for job in hopper_alone())]:
        print(json.dumps(compile_one(*job)), flush=True)
