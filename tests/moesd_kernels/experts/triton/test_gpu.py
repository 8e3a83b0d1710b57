"""The Triton and CUDA back-ends on a GPU: precision, graphs, torch.compile, invariance, launches.

Written without a GPU at hand; the same kernels run interpreted in ``interpreted/``. The tests
marked ``first`` take every path once: ``-m "gpu and first"`` says within seconds whether the rest
is worth running.
"""

from dataclasses import replace

import pytest
import torch
from support.oracle import check_rows, layer_case

from moesd_kernels import fused_experts
from moesd_kernels.experts import cuda
from moesd_kernels.experts.triton import fused_experts_triton, unavailable_reason
from moesd_kernels.experts.triton.types import LayerTiles, TileConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"triton: {unavailable_reason()}"),
]


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Workspaces start as NaN, or as numbers outside every table."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**28)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def exact_matmul():
    """The eager yardstick must not round fp32 to tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


FIRST = pytest.mark.first
SHAPES = {
    # E, K, H, I
    "many small experts": (64, 8, 1024, 512),
    "few large experts": (8, 2, 512, 1792),
    "prime E, sizes that fill no tile": (7, 3, 136, 72),
    "odd sizes: no vector loads": (5, 2, 33, 17),
    "K = E": (4, 4, 256, 128),
    "thousands of pairs: the plan reads ids in chunks": (8, 8, 128, 64),
}
# Every kernel takes about a second to compile: a shape has the numbers of tokens that it is for.
TOKENS = {
    ("many small experts", torch.bfloat16): (0, 1, 2, 5, 17, 64, 65, 300),
    ("few large experts", torch.bfloat16): (1, 5, 64, 300),
    ("prime E, sizes that fill no tile", torch.bfloat16): (1, 17, 65),
    ("odd sizes: no vector loads", torch.bfloat16): (1, 17),
    ("K = E", torch.bfloat16): (5,),
    ("thousands of pairs: the plan reads ids in chunks", torch.bfloat16): (700,),
    ("many small experts", torch.float16): (1, 17),
    ("many small experts", torch.float32): (1, 17, 65),
}
# One token, inline routing in blocks of 16 and 64 rows, a plan of its own; sizes without vectors.
FIRST_CASES = {
    *(("many small experts", torch.bfloat16, T) for T in (1, 5, 64, 300)),
    ("odd sizes: no vector loads", torch.bfloat16, 17),
    ("many small experts", torch.float32, 17),
}
CASES = [
    pytest.param(*case, marks=FIRST if case in FIRST_CASES else ())
    for case in ((*key, T) for key, tokens in TOKENS.items() for T in tokens)
]


@pytest.mark.parametrize(("name", "dtype", "T"), CASES, ids=str)
def test_matches_oracle(name, dtype, T, poisoned_empty):
    case = layer_case(*SHAPES[name], T, dtype, "cuda")
    check_rows(case, case.run(fused_experts_triton))


GPT_OSS = {
    "transposed": True,
    "interleaved": True,
    "bias": True,
    "activation_limit": 7.0,
    "activation_alpha": 1.702,
}


@pytest.mark.parametrize(
    ("flags", "T"),
    [
        ({"transposed": True}, 6),
        ({"interleaved": True}, 1),
        ({"interleaved": True}, 6),
        pytest.param({"bias": True}, 1, marks=FIRST),
        ({"bias": True}, 6),
        pytest.param(GPT_OSS, 6, marks=FIRST),
        (GPT_OSS | {"transposed": False}, 1),
        (GPT_OSS, 70),
        ({"activation_limit": 0.5}, 6),
        ({"gated": False, "activation": "relu2", "bias": True}, 1),
        ({"gated": False, "activation": "relu2", "bias": True}, 6),
        ({"activation": "gelu_tanh"}, 6),
        ({"activation": "gelu"}, 6),
    ],
    ids=str,
)
def test_variants(flags, T, poisoned_empty):
    case = layer_case(6, 2, 192, 96, T, torch.bfloat16, "cuda", **flags)
    check_rows(case, case.run(fused_experts_triton))


@pytest.mark.parametrize("T", [1, pytest.param(4, marks=FIRST), 100])
def test_skipped_and_duplicate_ids(T, poisoned_empty):
    generator = torch.Generator().manual_seed(T)
    ids = torch.randint(-2, 9, (T, 4), generator=generator)
    case = layer_case(7, 4, 128, 64, T, torch.bfloat16, "cuda", ids=ids)
    case.weights[(case.ids < 0) | (case.ids >= 7)] = float("nan")
    check_rows(case, case.run(fused_experts_triton))


ONE_TOKEN = TileConfig(16, 16, 256, num_stages=4)


@pytest.mark.parametrize(
    ("tile", "split_k"),
    [
        pytest.param(TileConfig(16, 64, 128, num_stages=4, swap_ab=True), 4, marks=FIRST),
        (TileConfig(64, 64, 64, num_stages=4, swap_ab=True), 1),
        (TileConfig(64, 128, 64, num_warps=8, group_m=4), 1),
        (TileConfig(128, 128, 64, num_warps=8, num_stages=4, group_m=4), 1),
        (TileConfig(16, 32, 64, num_stages=5, group_m=4), 2),
    ],
    ids=str,
)
def test_tilings(tile, split_k, poisoned_empty):
    """40 tokens of two in six experts: blocks of 16 rows are overflowed."""
    case = layer_case(6, 2, 256, 320, 40, torch.bfloat16, "cuda")
    config = LayerTiles(tile, replace(tile, split_k=split_k), ONE_TOKEN, ONE_TOKEN)
    check_rows(case, case.run(fused_experts_triton, config=config))


@pytest.mark.parametrize("inline_pairs", [pytest.param(0, marks=FIRST), 1024])
def test_plan_of_its_own_or_inline(inline_pairs, poisoned_empty):
    case = layer_case(6, 2, 256, 320, 300, torch.bfloat16, "cuda")
    tile = TileConfig(64, 64, 64, num_stages=4, group_m=4)
    config = LayerTiles(tile, tile, ONE_TOKEN, ONE_TOKEN, inline_pairs)
    check_rows(case, case.run(fused_experts_triton, config=config))


@pytest.mark.parametrize(
    "single_gate_up",
    [None, TileConfig(16, 8, 512, num_stages=4), TileConfig(16, 32, 256, num_warps=8)],
    ids=str,
)
def test_one_token_forms(single_gate_up, poisoned_empty):
    """The last expert is not here; with one expert the pipeline has few steps."""
    tile = TileConfig(16, 64, 64, num_stages=4)
    down = TileConfig(16, 8, 256, num_stages=8)
    config = LayerTiles(tile, tile, single_gate_up, down)
    for ids in ([[2, 0, 5, 9]], [[3]]):
        ids = torch.tensor(ids)
        case = layer_case(6, ids.shape[1], 520, 328, 1, torch.bfloat16, "cuda", ids=ids)
        check_rows(case, case.run(fused_experts_triton, config=config))


@pytest.mark.parametrize("T", [1, pytest.param(5, marks=FIRST), 140])
def test_graph_replay_with_changed_routing(T):
    cases = [layer_case(16, 4, 256, 192, T, torch.bfloat16, "cuda", seed=s) for s in range(4)]
    static = cases[0].rows(slice(None))
    out = torch.empty_like(static.x)
    run = lambda: static.run(fused_experts_triton, out=out)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for case in cases:
        for ours, new in ((static.x, case.x), (static.ids, case.ids)):
            ours.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        check_rows(static, out)


def test_compile_fullgraph_with_dynamic_tokens():
    case = layer_case(8, 2, 128, 96, 40, torch.bfloat16, "cuda")

    def layer(x, ids, weights):
        return 2 * fused_experts(x, case.w_gate_up, case.w_down, ids, weights, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for T in (3, 40, 17):
            part = case.rows(slice(T))
            expected = layer(part.x, part.ids, part.weights)
            got = compiled(part.x, part.ids, part.weights)
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("E", "K", "H", "I", "dtype"),
    [
        pytest.param(32, 4, 512, 384, torch.bfloat16, marks=FIRST, id="small"),
        pytest.param(8, 2, 1024, 3584, torch.bfloat16, id="split"),
        pytest.param(32, 4, 512, 384, torch.float32, id="fp32"),
    ],
)
def test_batch_invariant(E, K, H, I, dtype):
    """Rows are bit-identical for T = 1..64, beyond a block, and in any order.

    On Hopper blocks are 16, 32, 64 and 128 rows high here.
    """
    T = 400
    case = layer_case(E, K, H, I, T, dtype, "cuda")
    whole = case.run(fused_experts_triton, batch_invariant=True)
    check_rows(case, whole)
    for rows in (*range(1, 65), 65, 99, 200, 399):
        part = case.rows(slice(rows)).run(fused_experts_triton, batch_invariant=True)
        assert torch.equal(part, whole[:rows]), f"T = {rows}"
    for seed in range(4):
        order = torch.randperm(T, generator=torch.Generator().manual_seed(seed)).cuda()
        got = case.rows(order).run(fused_experts_triton, batch_invariant=True)
        assert torch.equal(got, whole[order])


def test_deterministic():
    case = layer_case(16, 4, 512, 256, 48, torch.bfloat16, "cuda")
    first = case.run(fused_experts_triton)
    for _ in range(10):
        assert torch.equal(case.run(fused_experts_triton), first)


@pytest.mark.parametrize(("T", "most"), [(1, 2), (8, 3), (128, 4)])
def test_number_of_launches(T, most):
    case = layer_case(32, 8, 256, 128, T, torch.bfloat16, "cuda")
    case.run(fused_experts_triton)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        case.run(fused_experts_triton)
        torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if event.device_time_total > 0]
    kernels = [name for name in kernels if "_kernel" in name]
    assert 1 <= len(kernels) <= most, kernels


@pytest.mark.skipif(
    cuda.unavailable_reason() is not None, reason=f"cuda: {cuda.unavailable_reason()}"
)
@pytest.mark.parametrize("T", [1, 2, pytest.param(8, marks=FIRST), 9, 33, 64, 65, 200])
@pytest.mark.parametrize(("E", "K", "H", "I"), [(16, 4, 256, 192), (8, 2, 1024, 1792)])
def test_cuda_backend(E, K, H, I, T):
    ids = torch.randint(-1, E + 1, (T, K), generator=torch.Generator().manual_seed(T))
    case = layer_case(E, K, H, I, T, torch.bfloat16, "cuda", ids=ids)
    for _ in range(2):
        check_rows(case, case.run(cuda.fused_experts_cuda))
