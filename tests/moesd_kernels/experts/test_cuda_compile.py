"""csrc/cuda without a GPU: compiles for three architectures, spills nothing, indexes rightly."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesd_kernels.experts import cuda
from moesd_kernels.experts.spec import DEFAULT_SPEC, ExpertsSpec, ExpertsWeights, TopK

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def compile_for(source, archs, output, *flags):
    """Run nvcc; its messages, which -Xptxas -v makes it give per kernel."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", *targets]
    done = subprocess.run(
        [*command, *flags, "-c", str(SOURCES / source), "-o", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("source", ["plan.cu", "combine.cu", "experts_sm90.cu"])
def test_compiles_without_spills(source, tmp_path):
    text = compile_for(source, ["80", "90a", "100"], tmp_path / "object.o", "--threads=3")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", text)
    assert spills, "ptxas said nothing about its kernels"
    assert set(spills) == {("0", "0")}, text
    # ptxas serialises wgmma, at a great loss of speed, when registers are touched in between.
    assert "serialized" not in text, text


@needs_nvcc
def test_hopper_code_uses_wgmma_and_tma(tmp_path):
    """Every width of the token operand, with copies into a ring; and nothing of it for others."""
    ptx = tmp_path / "experts.ptx"
    source = str(SOURCES / "experts_sm90.cu")
    for arch, expected in (("90a", {"8", "16", "32", "64"}), ("80", set())):
        command = ["nvcc", "-std=c++17", f"-arch=compute_{arch}", "-ptx", source, "-o", str(ptx)]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        text = ptx.read_text()
        assert (
            set(re.findall(r"wgmma\.mma_async\S*m64n(\d+)k16\.f32\.bf16\.bf16", text)) == expected
        )
        assert ("cp.async.bulk.tensor.2d" in text) == bool(expected)
        assert ("trap;" in text) == (not expected), "another architecture must fail, not return"


def implemented(device):
    """The ops that csrc/<device> registers kernels for."""
    texts = [path.read_text() for path in (ROOT / "csrc" / device).rglob("*.c*")]
    return set(re.findall(r'm\.impl\("(\w+)"', "".join(texts)))


def test_kernels_of_one_schema_have_one_type():
    """Written once: the CPU's kernel is declared by it, the CUDA kernel asserted to have it."""
    assert implemented("cpu") & implemented("cuda") == {"experts"}
    assert "\nExpertsOp experts;\n" in (ROOT / "csrc" / "cpu" / "ops" / "ops.h").read_text()
    held = "static_assert(std::is_same_v<decltype(experts), ExpertsOp>"
    assert held in (SOURCES / "register_cuda.cu").read_text()


@needs_nvcc
def test_registration_compiles_against_this_torch():
    """Its types and torch's headers, also those of a torch built without CUDA."""
    command = ["nvcc", "-std=c++20", "-x", "c++", "-c", "-Xcompiler", "-fsyntax-only"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include")]
    command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]  # a header that only CUDA builds have
    command += [str(SOURCES / "register_cuda.cu"), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_library_loads_beside_the_cpu_library():
    """In a child, which torch would end where the two libraries disagree."""
    code = (
        "import torch\n"
        "from moesd_kernels.experts import cuda\n"
        "cuda._load()\n"
        "has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "for op in ('experts', 'plan', 'combine'):\n"
        "    assert has_kernel(f'moesd::{op}', 'CUDA'), op\n"
        "assert has_kernel('moesd::experts', 'CPU')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_index_arithmetic(tmp_path):
    program = tmp_path / "layout"
    source = str(Path(__file__).parent / "cuda_layout_test.cpp")
    subprocess.run(["g++", "-std=c++17", "-O1", "-o", str(program), source], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why it cannot run without a GPU")
def test_unavailable_without_a_gpu():
    assert cuda.unavailable_reason() == "no CUDA device"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, r"got other \['activation'\]"),
        ({"gated": False, "transposed": True}, r"got other \['gated', 'transposed'\]"),
        ({"down_bias": torch.zeros(3, 64)}, r"got other \['down_bias'\]"),
        ({"batch_invariant": True}, "has not been shown on a GPU"),
    ],
)
def test_refuses_what_it_does_not_have(change, message):
    x, ids = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64)
    weights = ExpertsWeights(x.new_zeros(3, 128, 64), x.new_zeros(3, 64, 64))
    invariant = change.pop("batch_invariant", False)
    bias = change.pop("down_bias", None)
    arguments = x, weights._replace(down_bias=bias), TopK(ids, ids.float()), ExpertsSpec(**change)
    with pytest.raises(NotImplementedError, match=message):
        cuda.fused_experts_cuda(*arguments, batch_invariant=invariant)


def test_refuses_shapes_and_dtypes():
    ids = torch.zeros(2, 1, dtype=torch.int64)
    x = torch.zeros(2, 65, dtype=torch.bfloat16)
    weights, routing = ExpertsWeights(x, x.new_zeros(3, 65, 64)), TopK(ids, ids.float())
    with pytest.raises(NotImplementedError, match="multiples of 64, got 65 and 64"):
        cuda.fused_experts_cuda(x, weights, routing, DEFAULT_SPEC)
    with pytest.raises(NotImplementedError, match=r"must be torch.bfloat16, got torch.float32"):
        cuda.fused_experts_cuda(x.float(), weights, routing, DEFAULT_SPEC)
