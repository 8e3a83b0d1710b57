"""The choice of tiles: limits, purity, invariance, tuned files."""

import dataclasses
import json
import sys

import pytest
import torch

from bench.workloads.routing import DEFAULT_UNION_RATIO, route
from moesd_kernels.experts.triton import tuned
from moesd_kernels.experts.triton.config import (
    GROUP_M,
    READ_ONCE_TOKENS,
    Gemm,
    block_rows,
    fits,
    hopper_tiles,
    predicted_seconds,
    select_config,
    shared_bytes,
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
            most = 128 if chosen.block_m == 128 and device.capability == 90 else 64
            assert fits(gate_up, chosen.gate_up, device, most)
            assert fits(down, chosen.down, device, most)
            assert min(chosen.gate_up.block_n, chosen.down.block_n, chosen.block_m) >= 16


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, 8), (None, 8), (4, None)], ids=str)
@pytest.mark.parametrize("device", [A100, H200, B200], ids=lambda device: device.name)
def test_choices_for_quantised_weights_fit_the_device(device, bits):
    """Codes of 8 or 4 bits in the stages, and once their numbers beside them."""
    for T in TOKENS:
        for dtype in DTYPES:
            shape = LayerShape(*LAYERS["qwen3-30b"], T, weight_bits=bits)
            chosen = select_config(shape, dtype, device)
            gate_up = Gemm(1, 1, shape.I, shape.H, 2, dtype.itemsize, False, bits[0])
            down = Gemm(1, 1, shape.H, shape.I, 1, dtype.itemsize, True, bits[1])
            most = 128 if chosen.block_m == 128 and device.capability == 90 else 64
            assert fits(gate_up, chosen.gate_up, device, most)
            assert fits(down, chosen.down, device, most)
            for tile in (chosen.gate_up, chosen.down, chosen.single_gate_up, chosen.single_down):
                assert tile.block_k % 32 == 0


def test_quantised_weights_are_fewer_bytes():
    plain, quantised = Gemm(8, 4, 768, 2048, 2, 2, False), Gemm(8, 4, 768, 2048, 2, 2, False, 4)
    tile = TileConfig(16, 64, 128, num_stages=4)
    numbers = 2 * 64 * 128 * 2
    stage = 16 * 128 * 2
    assert shared_bytes(plain, tile) == 4 * (stage + numbers)
    assert shared_bytes(quantised, tile) == 4 * (stage + numbers // 4) + numbers
    assert predicted_seconds(quantised, tile, A100) < predicted_seconds(plain, tile, A100)


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
        assert block_rows(first) == block_rows(last)
        assert select_config(first, torch.bfloat16, A100) == select_config(
            last, torch.bfloat16, A100
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [A100, H200, B200], ids=lambda device: device.name)
def test_invariant_choice_sums_in_one_order(device, dtype):
    """Of T depend: the order of programs and, on Hopper, the height of a block."""
    chosen = [
        select_config(LayerShape(*LAYERS["olmoe"], T), dtype, device, batch_invariant=True)
        for T in TOKENS
    ]
    tiles = [tile for config in chosen for tile in (config.gate_up, config.down)]
    assert {tile.group_m for tile in tiles} == {1, GROUP_M}
    assert {tile.split_k for tile in tiles} == {1}
    assert len({tile.swap_ab for tile in tiles}) == 1
    heights = {config.block_m for config in chosen}
    if device.capability == 90 and dtype != torch.float32:
        assert heights == {16, 32, 64, 128}
        assert all(tile.swap_ab and tile.block_n // 64 == tile.num_warps // 4 for tile in tiles)
    else:
        assert len(heights) == 1
        assert len({config.with_group_m(1) for config in chosen}) == 1


def test_hopper_runs_by_rule_where_nobody_tuned():
    shape = LayerShape(32, 4, 4096, 1024, 8)
    chosen = select_config(shape, torch.bfloat16, H200)
    assert chosen == hopper_tiles(shape, torch.bfloat16, H200)
    assert (chosen.gate_up.num_stages, chosen.down.num_stages) == (5, 4)
    assert select_config(shape, torch.float32, H200) != chosen


def test_too_few_tiles_are_split():
    """Two experts of 2 x 32 tiles of 1.8 MB do not balance on 108 processors."""
    mixtral = LayerShape(*LAYERS["mixtral"], 2)
    assert select_config(mixtral, torch.bfloat16, A100).down.split_k > 1
    many = LayerShape(*LAYERS["qwen3-30b"], 64)
    assert select_config(many, torch.bfloat16, A100).down.split_k == 1


def test_model_is_near_the_floor_where_it_should_be():
    """All of Qwen3-30B's experts: the model's own time is within 15 % of bytes / bandwidth."""
    gemm = Gemm(128, 4, 768, 2048, 2, 2, False)
    chosen = select_config(LayerShape(*LAYERS["qwen3-30b"], 64), torch.bfloat16, A100).gate_up
    floor = 128 * 2 * 768 * 2048 * 2 / A100.bandwidth
    assert floor <= predicted_seconds(gemm, chosen, A100) <= 1.15 * floor


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
        path.write_text(
            json.dumps({"device": H200.name, "triton": "3.6.0", "entries": list(entries)})
        )
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
    tuned_file([tuned.entry_of(shape, "torch.bfloat16", mine)])
    chosen = select_config(shape, torch.bfloat16, H200)
    assert chosen == mine.with_block_m(used)
    assert select_config(shape, torch.float16, H200) != chosen
    invariant = select_config(shape, torch.bfloat16, H200, batch_invariant=True)
    assert invariant.gate_up != chosen.gate_up
    quantised = dataclasses.replace(shape, weight_bits=(8, 8))
    assert select_config(quantised, torch.bfloat16, H200).gate_up != chosen.gate_up


def test_the_nearest_entry_in_proportion_serves_up_to_twice_as_many(tuned_file):
    layer = LAYERS["olmoe"]
    tiles = {T: TileConfig(16, 32, 64, num_stages=n) for n, T in enumerate((1, 16, 64), start=2)}
    tuned_file(
        tuned.entry_of(LayerShape(*layer, T), "torch.bfloat16", LayerTiles(tile, tile, None, tile))
        for T, tile in tiles.items()
    )
    shapes = {T: LayerShape(*layer, T) for T in (1, 7, 8, 31, 33, 128, 129)}
    found = {T: select_config(s, torch.bfloat16, H200).gate_up for T, s in shapes.items()}
    entries = {T: next((t for t in tiles if tiles[t] == tile), None) for T, tile in found.items()}
    assert entries == {1: 1, 7: None, 8: 16, 31: 16, 33: 64, 128: 64, 129: None}


@pytest.mark.parametrize("name", ["mixtral", "qwen2-57b", "qwen3-30b"])
def test_an_h200s_own_tiles_fit_it(name):
    for T in range(1, 1025):
        shape = LayerShape(*LAYERS[name], T)
        assert tuned.tuned_tiles(H200.name, shape.layer, "torch.bfloat16", T)
        select_config(shape, torch.bfloat16, H200)


def test_tuned_file_that_cannot_be_used(tuned_file):
    path = tuned_file([{"E": 8}])
    with pytest.raises(ValueError, match=r"entry 0 cannot be used: KeyError\('K'\)"):
        tuned.load(path)


def test_checked_in_files_load():
    for path in sorted(tuned.FOLDER.glob("*.json")):
        assert tuned.load(path)
