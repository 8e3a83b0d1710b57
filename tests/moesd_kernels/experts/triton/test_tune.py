"""``bench tune`` as far as it goes without a GPU: candidates, the file, what counts as wrong."""

import dataclasses

import pytest
import torch

from bench.__main__ import main
from bench.tuning import search
from bench.tuning.table import has_entry, write_entry
from bench.workloads.shapes import Shape
from moesd_kernels.experts.triton import tuned
from moesd_kernels.experts.triton.config import (
    Gemm,
    group_rows,
    model_choice,
    select_config,
    shared_bytes,
)
from moesd_kernels.experts.triton.types import H200, LayerShape

SHAPE = LayerShape(64, 8, 2048, 1024, 16)
BF16 = torch.bfloat16


def choices(shape, step, limit=16):
    """(the model's choice, what a step of the search tries first)."""
    start = model_choice(shape, BF16, H200)
    return start, dict(search.search_steps(shape, BF16, H200, limit))[step](start)


@pytest.mark.parametrize("T", [2, 16, 64, 128, 512])
def test_candidates_are_distinct_and_fit(T):
    shape = LayerShape(*SHAPE.layer[:4], T)
    for step, streams, columns in (("gate_up", 2, 2048), ("down", 1, 1024)):
        start, configs = choices(shape, step)
        assert len({start, *configs}) == len(configs) + 1 > 6
        for config in configs:
            tile = getattr(config, step)
            assert shared_bytes(Gemm(1, 1, 64, columns, streams, 2, True), tile) < H200.shared_bytes
            assert columns / tile.split_k / tile.block_k >= 4 or tile.split_k == 1


def test_candidates_are_diverse():
    _, configs = choices(SHAPE, "gate_up")
    tiles = [config.gate_up for config in configs]
    for field in ("block_n", "block_k", "num_stages", "num_warps", "swap_ab"):
        assert len({getattr(tile, field) for tile in tiles}) > 1, field
    mixtral = LayerShape(8, 2, 4096, 14336, 16)
    assert {config.down.split_k for config in choices(mixtral, "down")[1]} == {1, 2, 4}


@pytest.mark.parametrize(("T", "rows"), [(16, {16}), (64, {16, 32, 64}), (128, {16, 32})])
def test_other_heights_of_a_block_are_tried(T, rows):
    """Both products change; where an expert may have several blocks, they are neighbours."""
    shape = LayerShape(*SHAPE.layer[:4], T)
    start, configs = choices(shape, "gate_up", 10)
    assert {start.block_m, *(config.block_m for config in configs)} == rows
    for config in configs:
        assert config.down.group_m == group_rows(shape, config.block_m)


def test_inline_is_tried_the_other_way():
    for T, expected in ((8, [0]), (100, [1024]), (200, [])):
        _, configs = choices(LayerShape(*SHAPE.layer[:4], T), "inline_pairs")
        assert [config.inline_pairs for config in configs] == expected


def test_one_token_candidates():
    one = LayerShape(*SHAPE.layer[:4], 1)
    start, configs = choices(one, "single_gate_up")
    assert len(configs) > 5
    assert None in [config.single_gate_up for config in configs], "the matrix product is one"
    assert {config.single_down for config in configs} == {start.single_down}
    assert len(choices(one, "single_down")[1]) > 5


def test_file_is_merged_and_readable(tmp_path):
    path = tuned.config_path("NVIDIA H200", tmp_path)
    chosen = model_choice(SHAPE, BF16, H200)
    chosen = dataclasses.replace(chosen, single_gate_up=None, inline_pairs=0)
    for T in (16, 64, 16):
        shape = LayerShape(*SHAPE.layer[:4], T)
        entry = tuned.entry_of(shape, "torch.bfloat16", chosen)
        write_entry(path, "NVIDIA H200", entry)
    (entries,) = tuned.load(path).values()
    assert list(entries) == [16, 64]
    assert has_entry(path, SHAPE, "torch.bfloat16")
    assert not has_entry(path, SHAPE, "torch.float16")
    assert entries[16] == chosen


class FakeBench:
    """Times and results by rule: one tile is fast, one fast but wrong, one not compilable."""

    dtype = BF16

    def __init__(self, *_):
        pass

    def batches(self, T):
        return [None]

    def output(self, batch, config):
        if config.down.block_k == 256:
            raise RuntimeError("out of resource")
        return torch.full((2, 8), 2.0 if config.down.block_n == 32 else 1.0)

    def seconds(self, batches, config):
        gain = (config.gate_up.block_k == 128) + 2 * (config.down.split_k == 2)
        gain += 4 * (config.inline_pairs == 0) + 8 * (config.down.block_n == 32)
        return 1e-3 - 1e-4 * gain


def test_search_takes_the_fastest_right_tiles():
    result = search._tune_tokens(FakeBench(), SHAPE, H200, 16, 60.0)
    best = result["config"]
    assert best.gate_up.block_k == 128
    assert best.down.split_k == 2
    assert best.inline_pairs == 0
    assert (result["micros"], result["model_micros"]) == (pytest.approx(300), pytest.approx(900))
    assert any(text.startswith("wrong result: down") for text in result["dropped"])
    assert any(text.startswith("RuntimeError: down") for text in result["dropped"])


def test_search_stops_in_time():
    result = search._tune_tokens(FakeBench(), SHAPE, H200, 16, 0.0)
    assert result["config"] == dataclasses.replace(model_choice(SHAPE, BF16, H200), inline_pairs=0)


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(search, "TilesBench", FakeBench)
    monkeypatch.setattr("bench.commands.tune.compile_jobs", lambda *_: (0, []))
    monkeypatch.setattr("bench.commands.tune.device_of", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H200.name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("moesd_kernels.experts.triton.device.device_of", lambda device: H200)
    yield
    tuned.use_folder(None)


def test_tuning_from_python_is_silent_and_what_it_writes_is_used(fake_gpu, tmp_path, capsys):
    shape, folder = Shape(*SHAPE.layer[:4]), tmp_path / "new" / "folder"
    results = list(search.tune_shape(shape, [16, 64], BF16, budget_s=60.0, folder=folder))
    assert [result["T"] for result in results] == [16, 64]
    assert capsys.readouterr().out == ""
    before = select_config(SHAPE, BF16, H200)
    tuned.use_folder(folder)
    assert select_config(SHAPE, BF16, H200) == results[0]["config"] != before
    tuned.use_folder(None)
    assert select_config(SHAPE, BF16, H200) == before


def test_command_prints_and_goes_on_where_it_stopped(fake_gpu, tmp_path, capsys):
    command = ["tune", "--shape", "olmoe", "--folder", str(tmp_path), "--tokens"]
    assert main([*command, "16"]) == 0
    assert "T=16: 300.0 us, the model's 900.0 us" in capsys.readouterr().out
    assert main([*command, "16,32", "--budget", "0"]) == 0
    assert "out of time before T = 32" in capsys.readouterr().out


def test_one_wrong_element_is_seen():
    expected = torch.randn(4, 64)
    assert search.close(expected * (1 + 2**-9), expected, torch.bfloat16)
    wrong = expected.clone()
    wrong[2, 5] += 0.1 * expected[2].abs().max()
    assert not search.close(wrong, expected, torch.bfloat16)
    wrong[2, 5] = float("nan")
    assert not search.close(wrong, expected, torch.bfloat16)


def test_dry_run_needs_no_gpu(capsys):
    assert main(["tune", "--shape", "olmoe", "--tokens", "8", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shape = LayerShape(*SHAPE.layer[:4], 8)
    steps = ("gate_up", "down", "inline_pairs")
    assert len(lines) == sum(1 + len(choices(shape, step)[1]) for step in steps)
    assert all("block_k" in line or "inline_pairs" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu(capsys):
    assert main(["tune", "--shape", "olmoe"]) == 2
    assert "tune needs a CUDA device, found none" in capsys.readouterr().err
