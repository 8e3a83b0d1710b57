"""One point of the layer benchmark: peers that fail, that are slow, that cannot be captured."""

from __future__ import annotations

import logging
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.measure.ceilings import Ceilings
from bench.measure.record import Recorder
from bench.peers.experts_transformers import IMPLEMENTATIONS
from bench.runs import layer as layer_benchmark
from bench.runs.layer import SLOW_S, LayerBenchmark
from bench.runs.layer_record import Settings
from bench.workloads.layer import floor_seconds
from bench.workloads.shapes import Shape

SHAPE = Shape(16, 2, 32, 16)
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11})
EAGERLY = Settings(
    dtype=torch.float32,
    device=torch.device("cpu"),
    routing="uniform",
    union_ratio=1.0,
    rounds=4,
    budget_s=60.0,
    backend="torch",
    batch_invariant=False,
    graph=False,
    peers=["grouped_mm"],
)
GRAPHS = replace(EAGERLY, graph=True)


class Stack:
    """A captured stack that lasts as many seconds as there are distinct experts a layer."""

    refused: tuple[object, ...] = ()
    seen = staticmethod(lambda distinct: None)

    def __init__(self, call, layers, example):
        if call in self.refused:
            raise RuntimeError("called a synchronizing CUDA operation\nand a trace")

    def seconds(self, batches):
        mean = sum(batch.distinct for batch in batches) / len(batches)
        self.seen(mean)
        return mean


@pytest.fixture
def benchmark_of(monkeypatch):
    """Makes a benchmark without the probe of a CPU's ceilings and with pretended graphs."""
    monkeypatch.setattr(layer_benchmark, "CeilingProbe", lambda dtype: None)
    monkeypatch.setattr(layer_benchmark, "CapturedStack", Stack)
    monkeypatch.setattr(Stack, "refused", ())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return lambda settings, shape=SHAPE: LayerBenchmark(
        shape, settings, CEILINGS, Recorder(None), None
    )


@pytest.mark.parametrize("peer", IMPLEMENTATIONS)
def test_transformers_implementations_agree_with_ours(benchmark_of, peer):
    line = benchmark_of(replace(EAGERLY, peers=[peer])).measure(3, 2)
    assert line["seconds"].keys() == {"moesd", peer}
    assert line["not_captured"] == line["not_run"] == line["fused_moe"] == {}


def test_a_peer_that_cannot_run_costs_nothing_but_itself(benchmark_of, caplog):
    def broken(layer, *inputs):
        raise NotImplementedError("needs another device\nand a trace")

    benchmark = benchmark_of(EAGERLY)
    benchmark.calls["broken"] = broken
    with caplog.at_level(logging.WARNING):
        line = benchmark.measure(3, 2)
    assert line["not_run"] == {"broken": "NotImplementedError: needs another device"}
    assert line["seconds"].keys() == {"moesd", "grouped_mm"}
    assert "broken does not run at T=6" in caplog.text


def test_a_peer_that_is_wrong_ends_the_run(benchmark_of):
    benchmark = benchmark_of(EAGERLY)
    benchmark.calls["wrong"] = lambda layer, hidden, *routing: hidden
    with pytest.raises(RuntimeError, match="wrong differs from moesd"):
        benchmark.measure(3, 2)


def test_a_line_says_what_was_not_captured_and_why(benchmark_of, monkeypatch):
    benchmark = benchmark_of(GRAPHS)
    monkeypatch.setattr(Stack, "refused", (benchmark.calls["grouped_mm"],))
    line = benchmark.measure(3, 2)
    assert line["not_captured"] == {"grouped_mm": "called a synchronizing CUDA operation"}
    assert line["seconds"]["grouped_mm"]["median"] < 1.0  # not the pretended seconds of a replay


def test_a_slow_peer_was_timed_outside_the_graph(benchmark_of, monkeypatch):
    benchmark = benchmark_of(GRAPHS)
    times = lambda call, device: (2 * SLOW_S, call())
    monkeypatch.setattr(layer_benchmark, "seconds_of", times)
    line = benchmark.measure(3, 2)
    assert line["not_captured"] == {"grouped_mm": f"slower than {SLOW_S} s"}
    assert line["seconds"]["grouped_mm"]["median"] == 2 * SLOW_S


def test_a_floor_counts_the_experts_of_the_batches_that_were_replayed(benchmark_of, monkeypatch):
    monkeypatch.setattr(layer_benchmark, "stack_size", lambda layer_bytes: 3)
    replayed = []
    monkeypatch.setattr(Stack, "seen", replayed.append)
    line = benchmark_of(replace(GRAPHS, peers=[])).measure(3, 2)
    rounds = replayed[1:]  # after the warm-up
    assert len(set(rounds)) > 1
    floors = [floor_seconds(SHAPE, 6, distinct, 1e10, 1e11, 4) / distinct for distinct in rounds]
    assert line["of_roof"] == pytest.approx(statistics.median(floors), rel=1e-9)
    assert line["distinct"] == pytest.approx(statistics.mean(rounds))


def test_the_fused_moe_peer_is_timed_in_graphs_only(tmp_path, capsys):
    flags = ["--shape", "embedded", "--device", "cpu", "--fused-moe-source", str(tmp_path)]
    assert main(["kernels", *flags]) == 2
    assert "in CUDA graphs only" in capsys.readouterr().err


def test_the_fused_moe_peer_is_one_more_call_and_says_what_it_ran(benchmark_of, monkeypatch):
    source = Path(__file__).parent / "fake_vllm"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    benchmark = benchmark_of(replace(GRAPHS, fused_moe_source=source))
    line = benchmark.measure(3, 2)
    # Without a GPU its kernels cannot be launched; interpreted, they are tested by themselves.
    assert line["not_run"].keys() == {"vllm_triton"}
    assert line["fused_moe"]["vllm_triton"]["BLOCK_SIZE_M"] == 4


@pytest.mark.parametrize(
    ("weight_format", "weight_bytes"),
    [("int4", 18 / 32), ("mxfp4", 17 / 32), ("q4_0+q8_0", (2 * 18 + 34) / 96)],
)
def test_quantised_weights_are_counted_and_held_to_plain_ones(
    benchmark_of, weight_format, weight_bytes
):
    settings = replace(EAGERLY, weight_format=weight_format, dtype=torch.float32)
    assert settings.weight_bytes == pytest.approx(weight_bytes)
    line = benchmark_of(settings, Shape(16, 2, 64, 32)).measure(2, 3)
    assert line["weight_format"] == weight_format
    assert set(line["ratio"]) == {"plain", "grouped_mm", "int8_activations"}
    experts = line["distinct"] * 3 * 64 * 32 * weight_bytes
    assert line["bytes"] == pytest.approx(experts + 2 * 6 * 64 * 4)
