"""``bench tune`` as far as it goes without a GPU: candidates, the file, what counts as wrong."""

import pytest
import torch

from bench import tune
from bench.__main__ import main
from moesd_kernels.triton import tuned
from moesd_kernels.triton.config import bucket, fits, select_config
from moesd_kernels.triton.types import H200, LayerShape

SHAPE = LayerShape(64, 8, 2048, 1024, 16)


def test_candidates_fit_and_start_with_the_models_choice():
    chosen = select_config(SHAPE, torch.bfloat16, H200)
    gate_up, down = tune._gemms(SHAPE, 2)
    for gemm, start in ((gate_up, chosen.gate_up), (down, chosen.down)):
        tiles = tune.candidates(gemm, start, H200, 20)
        assert tiles[0] == start
        assert len(tiles) == len(set(tiles)) == 21
        assert all(fits(gemm, tile, H200) for tile in tiles)
        assert {tile.block_m for tile in tiles} == {start.block_m}
        assert gemm.may_split or {tile.split_k for tile in tiles} == {1}


def test_one_token_candidates():
    chosen = select_config(SHAPE, torch.bfloat16, H200)
    tiles = tune.candidates(tune._gemms(SHAPE, 2)[1], chosen.single_down, H200, 100, single=True)
    assert len(tiles) > 5
    assert all(tile.block_n * tile.block_k <= 2048 * tile.num_warps for tile in tiles)


def test_file_is_merged_and_readable(tmp_path):
    path = tuned.config_path("NVIDIA H200", tmp_path)
    chosen = select_config(SHAPE, torch.bfloat16, H200)
    for T in (16, 64, 16):
        shape = LayerShape(*SHAPE.layer[:4], T)
        entry = tuned.entry_of(shape, "torch.bfloat16", bucket(shape), chosen)
        tune.write_entry(path, "NVIDIA H200", entry)
    assert len(tuned.load(path)) == 2
    assert tune.has_entry(path, SHAPE, "torch.bfloat16")
    assert not tune.has_entry(path, SHAPE, "torch.float16")
    assert tuned.load(path)[(SHAPE.layer, "torch.bfloat16", bucket(SHAPE))] == chosen


class FakeBench:
    """Times and results by rule: one tile is fast, one fast but wrong, one not compilable."""

    dtype = torch.bfloat16

    def batches(self, T):
        return [None]

    def output(self, batch, config):
        if config.down.num_stages == 6:
            raise RuntimeError("out of resource")
        return torch.full((2, 8), 2.0 if config.down.block_n == 32 else 1.0)

    def seconds(self, batches, config):
        tile = config.gate_up
        return 1e-3 - 1e-4 * (tile.block_k == 128) - 1e-4 * (config.down.block_n == 32)


def test_search_takes_the_fastest_right_tiles(capsys):
    best, micros, model = tune._tune_tokens(FakeBench(), SHAPE, H200, 200, 60.0)
    assert best.gate_up.block_k == 128
    assert best.down.block_n != 32 and best.down.num_stages != 6
    assert micros <= model
    said = capsys.readouterr().out
    assert "dropped, wrong result: down" in said
    assert "dropped, RuntimeError: down" in said


def test_search_stops_in_time():
    chosen = select_config(SHAPE, torch.bfloat16, H200)
    best, _, _ = tune._tune_tokens(FakeBench(), SHAPE, H200, 200, 0.0)
    assert best == chosen


def test_one_wrong_element_is_seen():
    expected = torch.randn(4, 64)
    assert tune.close(expected * (1 + 2**-9), expected, torch.bfloat16)
    wrong = expected.clone()
    wrong[2, 5] += 0.1 * expected[2].abs().max()
    assert not tune.close(wrong, expected, torch.bfloat16)
    wrong[2, 5] = float("nan")
    assert not tune.close(wrong, expected, torch.bfloat16)


def test_dry_run_needs_no_gpu(capsys):
    assert main(["tune", "--shape", "olmoe", "--tokens", "8", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 17
    assert all("us predicted" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu(capsys):
    assert main(["tune", "--shape", "olmoe"]) == 2
    assert "tune needs a CUDA device, found none" in capsys.readouterr().err
