"""moesd::experts on the CPU: against fp64, row invariance bit for bit, argument checks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from support.oracle import assert_as_accurate

from moesd_kernels import library
from moesd_kernels.experts.cpu import fused_experts_cpu
from moesd_kernels.experts.spec import ExpertsSpec, ExpertsWeights, TopK
from moesd_kernels.experts.spec.activations import FUNCTIONS

pytestmark = pytest.mark.skipif(library.load("cpu") is not None, reason=str(library.load("cpu")))


def make(T, E, K, H, I, dtype, *, gated=True, transposed=False, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    up = 2 * I if gated else I
    data = {
        "hidden": torch.randn(T, H, generator=g),
        "w_gate_up": torch.randn(E, up, H, generator=g) / H**0.5,
        "w_down": torch.randn(E, H, I, generator=g) / I**0.5,
    }
    if transposed:
        data["w_gate_up"] = data["w_gate_up"].mT.contiguous()
        data["w_down"] = data["w_down"].mT.contiguous()
    if bias:
        data["gate_up_bias"] = torch.randn(E, up, generator=g)
        data["down_bias"] = torch.randn(E, H, generator=g)
    data = {name: tensor.to(dtype) for name, tensor in data.items()}
    logits = torch.randn(T, E, generator=g)
    weights, ids = logits.softmax(-1).topk(K, dim=-1)
    return data | {"topk_ids": ids, "topk_weights": weights}


def experts(
    hidden, w_gate_up, w_down, topk_ids, topk_weights, gate_up_bias=None, down_bias=None,
    out=None, **options
):  # fmt: skip
    weights = ExpertsWeights(w_gate_up, w_down, gate_up_bias, down_bias)
    spec = ExpertsSpec(**options)
    return fused_experts_cpu(hidden, weights, TopK(topk_ids, topk_weights), spec, out)


def eager(data, dtype, *, activation="silu", gated=True, interleaved=False, transposed=False,
          activation_limit=None, activation_alpha=None):  # fmt: skip
    """Expert by expert in `dtype`, rounding after each step as transformers' eager experts do."""
    x = data["hidden"].to(dtype)
    out = torch.zeros_like(x)
    for e in range(data["w_down"].shape[0]):
        token, k = torch.where(data["topk_ids"] == e)
        w1, w2 = data["w_gate_up"][e].to(dtype), data["w_down"][e].to(dtype)
        w1, w2 = (w1.T, w2.T) if transposed else (w1, w2)
        h = x[token] @ w1.T
        if "gate_up_bias" in data:
            h = h + data["gate_up_bias"][e].to(dtype)
        gate, up = h, None
        if gated:
            gate, up = (h[:, ::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=-1)
        if activation_limit is not None:
            gate = gate.clamp(max=activation_limit)
            up = None if up is None else up.clamp(-activation_limit, activation_limit)
        if activation_alpha is not None:
            h = (up + 1) * (gate * torch.sigmoid(gate * activation_alpha))
        else:
            h = FUNCTIONS[activation](gate)
            h = h if up is None else h * up
        y = h @ w2.T
        if "down_bias" in data:
            y = y + data["down_bias"][e].to(dtype)
        out.index_add_(0, token, y * data["topk_weights"][token, k, None].to(dtype))
    return out


def check(data, dtype, **options):
    out = torch.full_like(data["hidden"], float("nan"))
    result = experts(**data, **options, out=out)
    assert result is out
    exact = eager(data, torch.float64, **options)
    assert_as_accurate(out, eager(data, dtype, **options), exact, name="experts")


SHAPES = {
    "one token": (1, 8, 2, 64, 48),
    "odd sizes, prime E": (5, 7, 3, 37, 19),
    "one expert per token": (9, 4, 1, 96, 64),
    "every expert": (6, 4, 4, 64, 33),
    "several chunks of tokens": (150, 2, 2, 1040, 72),
    "rows past one block": (3, 4, 2, 32, 200),
    "embedded model": (40, 32, 4, 256, 48),
    "no token": (0, 4, 2, 32, 32),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_fp64(shape, dtype):
    check(make(*shape, dtype), dtype)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation, gated):
    for dtype in (torch.bfloat16, torch.float32):
        data = make(7, 5, 2, 48, 40, dtype, gated=gated)
        check(data, dtype, activation=activation, gated=gated)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_layouts_biases_and_clamps(dtype, interleaved, transposed):
    data = make(7, 5, 2, 50, 83, dtype, transposed=transposed, bias=True)
    layout = {"interleaved": interleaved, "transposed": transposed}
    check(data, dtype, **layout)
    check(data, dtype, **layout, activation_limit=0.7)
    check(data, dtype, **layout, activation_limit=0.7, activation_alpha=1.702)


def test_each_expert_alone():
    """Experts of very different magnitude: a small one's error cannot hide under a large one."""
    data = make(12, 6, 2, 64, 48, torch.bfloat16)
    data["w_down"] *= torch.logspace(-3, 3, 6).view(-1, 1, 1).bfloat16()
    for e in range(6):
        one = data | {"topk_ids": torch.full((12, 1), e), "topk_weights": torch.ones(12, 1)}
        check(one, torch.bfloat16)


def test_ids_out_of_range_duplicates_and_int32():
    data = make(6, 4, 3, 64, 48, torch.bfloat16)
    data["topk_ids"] = torch.tensor(
        [[-1, 0, 4], [1, 1, 2], [4, 4, -1], [3, 3, 3], [0, 1, 2], [2**31 - 1, -5, 0]]
    )
    check(data, torch.bfloat16)
    expected = experts(**data)
    assert bool((expected[2] == 0).all())
    data["topk_ids"] = data["topk_ids"].int()
    assert torch.equal(experts(**data), expected)


def test_unused_experts_are_not_read():
    data = make(4, 6, 2, 64, 48, torch.bfloat16)
    data["topk_ids"] = data["topk_ids"] % 3
    expected = experts(**data)
    data["w_gate_up"][3:] = float("nan")
    data["w_down"][3:] = float("nan")
    assert torch.equal(experts(**data), expected)


def test_non_contiguous_inputs_and_weight_dtypes():
    data = make(6, 4, 2, 64, 48, torch.bfloat16)
    expected = experts(**data)
    strided = data | {
        "hidden": data["hidden"].repeat(1, 2)[:, :64],
        "topk_ids": data["topk_ids"].T.contiguous().T,
    }
    assert torch.equal(experts(**strided), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded = data["topk_weights"].to(dtype)
        expected = experts(**data | {"topk_weights": rounded.float()})
        assert torch.equal(experts(**data | {"topk_weights": rounded}), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 256, 48), (3, 2, 1040, 104)], ids=str)
def test_rows_do_not_depend_on_the_batch(shape, dtype, threads):
    E, K, H, I = shape
    data = make(64, E, K, H, I, dtype)
    rows = ("hidden", "topk_ids", "topk_weights")
    threads(1)
    whole = experts(**data)
    for count in (1, 2):
        threads(count)
        for T in range(1, 65):
            part = data | {name: data[name][64 - T :] for name in rows}
            assert torch.equal(experts(**part), whole[64 - T :]), (T, count)
        for seed in range(4):
            order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
            mixed = data | {name: data[name][order] for name in rows}
            assert torch.equal(experts(**mixed), whole[order])
        alone = data | {
            "topk_ids": torch.where(torch.arange(64)[:, None] == 7, data["topk_ids"], 0)
        }
        assert torch.equal(experts(**alone)[7], whole[7])


def test_transposed_rows_do_not_depend_on_the_batch():
    data = make(20, 4, 2, 64, 40, torch.bfloat16, transposed=True)
    whole = experts(**data, transposed=True)
    for t in range(20):
        row = {n: data[n][t : t + 1] for n in ("hidden", "topk_ids", "topk_weights")}
        assert torch.equal(experts(**data | row, transposed=True)[0], whole[t])


def test_nan_stays_in_its_row():
    data = make(6, 4, 2, 64, 48, torch.bfloat16)
    clean = experts(**data)
    data["hidden"][2, 5] = float("nan")
    out = experts(**data)
    assert bool(out[2].isnan().all())
    keep = torch.arange(6) != 2
    assert torch.equal(out[keep], clean[keep])


def test_large_gates_stay_finite():
    data = make(4, 4, 2, 32, 32, torch.float32)
    data["hidden"] *= 1e4
    check(data, torch.float32)


def test_a_profiler_sees_the_phases(threads):
    data = make(16, 4, 2, 256, 256, torch.bfloat16)
    for count in (1, 2):
        threads(count)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            experts(**data)
        names = [e.name for e in profiler.events() if e.name.startswith("moesd::")]
        phases = ["moesd::plan", "moesd::gate_up", "moesd::down_combine"]
        assert sorted(names) == sorted(["moesd::experts", *phases])


def test_schema_and_fake():
    data = make(3, 4, 2, 32, 32, torch.bfloat16)
    arguments = (*data.values(), None, None, "silu", True, False, False, None, None)
    arguments = (*arguments, "plain", "plain", False, None, None)
    torch.library.opcheck(
        torch.ops.moesd.experts.default, (*arguments, torch.empty_like(data["hidden"]))
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(3)}, ValueError, r"hidden must be \[T, H\], got \[3\]"),
        ({"w_down": torch.zeros(4, 32, 31)}, ValueError, r"w_gate_up must be \[4, 62, 32\]"),
        ({"topk_ids": torch.zeros(2, 2)}, ValueError, r"topk_ids must be \[3, K\], got \[2, 2\]"),
        ({"topk_ids": torch.zeros(3, 2)}, TypeError, "topk_ids must be int32 or int64, got Float"),
        ({"topk_weights": torch.zeros(3, 1)}, ValueError, r"topk_weights must be \[3, 2\]"),
        ({"activation": "tanh"}, ValueError, "activation must be silu.*got tanh"),
        ({"hidden": torch.zeros(3, 32).double()}, TypeError, "must be Double like hidden"),
        ({"gated": False, "activation_alpha": 1.0}, ValueError, "w_gate_up must be"),
    ],
)
def test_errors(change, error, message):
    data = make(3, 4, 2, 32, 32, torch.float32)
    nothing = ("gate_up_bias", "down_bias", "gate_up_scale", "down_scale")
    plain = dict.fromkeys(nothing) | asdict(ExpertsSpec()) | {"down_format": "plain"}
    del plain["op_options"]
    with pytest.raises(error, match=message):
        torch.ops.moesd.experts(**plain | data | change, out=torch.empty(3, 32))


# In a process of its own: its address space is bounded, and without the mend it is killed.
OUT_OF_MEMORY = """
import resource, torch
from moesd_kernels import fused_experts, library
from moesd_kernels.dense import ops

assert library.load("cpu") is None
gate_up, down = torch.randn(2, 8192, 16), torch.randn(2, 16, 4096)

def call(tokens):
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    return fused_experts(torch.ones(tokens, 16), gate_up, down, ids, torch.ones(tokens, 1))

with torch.no_grad():
    before, product = call(3), ops.linear(torch.ones(3, 16), gate_up[0])
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**28,) * 2)
    for _ in range(2):
        try:
            call(100_000)
        except RuntimeError as error:
            assert "out of memory: could not allocate" in str(error), error
        else:
            raise AssertionError("there was memory")
        assert torch.equal(call(3), before)
        assert torch.equal(ops.linear(torch.ones(3, 16), gate_up[0]), product)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_goes_on_after_there_was_no_memory_for_scratch():
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
