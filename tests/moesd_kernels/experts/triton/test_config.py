"""The choice of tiles: limits, purity, buckets, invariance, tuned files."""

import dataclasses
import json
import sys

import pytest
import torch

from bench.workloads.routing import DEFAULT_UNION_RATIO, route
from moesd_kernels.experts.triton import tuned
from moesd_kernels.experts.triton.config import (
    READ_ONCE_TOKENS,
    Gemm,
    block_rows,
    bucket,
    fits,
    predicted_seconds,
    select_config,
)
from moesd_kernels.experts.triton.types import A100, B200, H200, LayerShape, LayerTiles, TileConfig

LAYERS = {
    "mixtral": (8, 2, 4096, 14336),
    "qwen2-57b": (64, 8, 3584, 2560),
    "qwen3-30b": (128, 8, 2048, 768),
    "olmoe": (64, 8, 2048, 1024),
    "deepseek-v3": (256, 8, 7168, 2048),
    "tiny, odd": (7, 3, 33, 17),
}
TOKENS = (1, 2, 3, 5, 8, 16, 17, 33, 64, 65, 128, 320, 1024, 8192)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("device", [A100, H200, B200], ids=lambda device: device.name)
@pytest.mark.parametrize("name", LAYERS)
def test_choices_fit_the_device(name, device):
    for T in TOKENS:
        for dtype in DTYPES:
            shape = LayerShape(*LAYERS[name], T)
            chosen = select_config(shape, dtype, device)
            gate_up = Gemm(1, 1, shape.I, shape.H, 2, dtype.itemsize, False)
            down = Gemm(1, 1, shape.H, shape.I, 1, dtype.itemsize, True)
            assert fits(gate_up, chosen.gate_up, device)
            assert fits(down, chosen.down, device)
            assert min(chosen.gate_up.block_n, chosen.down.block_n, chosen.block_m) >= 16


@pytest.mark.parametrize("T", range(1, READ_ONCE_TOKENS + 1))
def test_a_block_holds_every_token_up_to_64(T):
    assert block_rows(LayerShape(*LAYERS["qwen3-30b"], T)) >= T


@pytest.mark.parametrize(
    ("name", "T", "rows"),
    [
        ("qwen2-57b", 320, 64),  # mean 40: twice the mean would be 128 rows
        ("qwen2-57b", 128, 32),
        ("qwen3-30b", 96, 16),
        ("qwen3-30b", 256, 32),
        ("mixtral", 128, 64),
        ("mixtral", 8192, 128),
    ],
)
def test_a_block_holds_nearly_every_experts_tokens_beyond(name, T, rows):
    assert block_rows(LayerShape(*LAYERS[name], T)) == rows


@pytest.mark.parametrize(("routing", "share"), [("uniform", 1 / 200), ("correlated", 1 / 25)])
@pytest.mark.parametrize("name", ["qwen2-57b", "qwen3-30b", "mixtral", "deepseek-v3"])
def test_few_experts_overflow_their_block(name, routing, share):
    """64 sequences verify five tokens each, drawn 20 times."""
    E, K = LAYERS[name][:2]
    block_m = block_rows(LayerShape(*LAYERS[name], 320))
    generator = torch.Generator().manual_seed(0)
    draws = [
        route(routing, 64, 5, E, K, generator, DEFAULT_UNION_RATIO).flatten() for _ in range(20)
    ]
    counts = torch.stack([ids.bincount(minlength=E) for ids in draws])
    assert (counts > block_m).float().mean() <= share


def test_depends_on_tokens_per_expert_and_height_only():
    layer = LAYERS["qwen3-30b"]
    for low, high in ((33, 64), (65, 96), (129, 256)):
        first, last = (LayerShape(*layer, T) for T in (low, high))
        assert bucket(first) == bucket(last)
        assert block_rows(first) == block_rows(last)
        assert select_config(first, torch.bfloat16, H200) == select_config(
            last, torch.bfloat16, H200
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invariant_choice_does_not_depend_on_tokens(dtype):
    chosen = {
        select_config(LayerShape(*LAYERS["olmoe"], T), dtype, H200, batch_invariant=True)
        for T in TOKENS
    }
    assert len(chosen) == 1


def test_too_few_tiles_are_split():
    """Two experts of 2 x 32 tiles of 1.8 MB do not balance on 132 processors."""
    mixtral = LayerShape(*LAYERS["mixtral"], 2)
    assert select_config(mixtral, torch.bfloat16, H200).down.split_k > 1
    many = LayerShape(*LAYERS["qwen3-30b"], 64)
    assert select_config(many, torch.bfloat16, H200).down.split_k == 1


def test_model_is_near_the_floor_where_it_should_be():
    """All of Qwen3-30B's experts: the model's own time is within 15 % of bytes / bandwidth."""
    gemm = Gemm(128, 4, 768, 2048, 2, 2, False)
    chosen = select_config(LayerShape(*LAYERS["qwen3-30b"], 64), torch.bfloat16, H200).gate_up
    floor = 128 * 2 * 768 * 2048 * 2 / H200.bandwidth
    assert floor <= predicted_seconds(gemm, chosen, H200) <= 1.15 * floor


def test_starts_no_triton():
    code = "import sys, moesd_kernels.experts.triton.config; sys.exit('triton' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_n": 48}, "block_n must be a power of two, got 48"),
        ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        TileConfig(**({"block_m": 16, "block_n": 32, "block_k": 64} | change))


def test_one_plan_serves_both_products():
    tall, low = TileConfig(32, 64, 64), TileConfig(16, 64, 64)
    with pytest.raises(ValueError, match=r"block_m must be equal, got 32 and 16"):
        LayerTiles(tall, low, low, low)
    with pytest.raises(ValueError, match=r"gate_up.split_k must be 1, got 2"):
        LayerTiles(dataclasses.replace(low, split_k=2), low, low, low)


@pytest.fixture
def tuned_file(tmp_path):
    """Write entries as H200's file and make the selector read it."""

    def write(entries):
        path = tuned.config_path(H200.name, tmp_path)
        path.write_text(json.dumps({"device": H200.name, "triton": "3.6.0", "entries": entries}))
        tuned.use_folder(tmp_path)
        return path

    yield write
    tuned.use_folder(None)


@pytest.mark.parametrize(("block_m", "used"), [(16, 16), (128, 64)])
def test_tuned_file_overrides_the_model(tuned_file, block_m, used):
    """Blocks may be lower than the selector's, which hold every token, never taller."""
    shape = LayerShape(*LAYERS["olmoe"], 40)
    tile = TileConfig(block_m, 32, 256, num_stages=2)
    mine = LayerTiles(tile, tile, None, tile, inline_pairs=128)
    tuned_file([tuned.entry_of(shape, "torch.bfloat16", bucket(shape), mine)])
    chosen = select_config(shape, torch.bfloat16, H200)
    assert chosen == mine.with_block_m(used)
    assert select_config(shape, torch.float16, H200) != chosen
    invariant = select_config(shape, torch.bfloat16, H200, batch_invariant=True)
    assert invariant.gate_up != chosen.gate_up


def test_tuned_file_that_cannot_be_used(tuned_file):
    path = tuned_file([{"E": 8}])
    with pytest.raises(ValueError, match=r"entry 0 cannot be used: KeyError\('K'\)"):
        tuned.load(path)


def test_checked_in_files_load():
    for path in sorted(tuned.FOLDER.glob("*.json")):
        assert tuned.load(path)
