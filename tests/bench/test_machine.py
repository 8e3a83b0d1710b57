"""The ceilings and the machine's curves as a GPU would measure them, with a timer that pretends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.measure import ceilings, machine
from bench.workloads.shapes import Shape

SHAPE = Shape(4, 2, 8, 8)
CUDA = torch.device("cuda")


def test_the_expert_curve_of_a_gpu_is_taken_in_graphs_of_cold_layers(monkeypatch):
    stacks: list[FakeStack] = []

    class FakeStack:
        def __init__(self, call: Any, layers: Any, example: Any) -> None:
            stacks.append(self)
            self.outputs = [
                call(layer, example.hidden, example.topk_ids, example.topk_weights)
                for layer in layers
            ]
            self.tokens, self.replays = len(example.hidden), 0

        def seconds(self, batches: Any) -> float:
            assert len(batches) == len(self.outputs)
            self.replays += 1
            return self.tokens / self.replays

    monkeypatch.setattr(machine, "CapturedStack", FakeStack)
    cpu = torch.device("cpu")
    batches = [machine._batch(SHAPE, rows, torch.float32, cpu) for rows in machine.ROWS]
    seconds = machine.seconds_in_graphs(SHAPE, torch.float32, cpu, batches)
    assert [stack.tokens for stack in stacks] == [4 * rows for rows in machine.ROWS]
    assert seconds == [stack.tokens / machine.REPEATS for stack in stacks], "the fastest replay"
    for stack in stacks:
        first, second = stack.outputs
        assert not torch.equal(first, second), "every layer has weights of its own"


def test_a_gpu_takes_the_graph_path_on_a_shape_beyond_its_cache(monkeypatch):
    monkeypatch.setattr(machine, "_batch", lambda *_: None)
    monkeypatch.setattr(machine, "_seconds_of_calls", lambda *_: pytest.fail("timed eagerly"))
    monkeypatch.setattr(machine, "seconds_in_graphs", lambda shape, *_: [1.0] * len(machine.ROWS))
    shape = machine.CURVE_SHAPES["cuda"]
    assert shape.E * shape.expert_bytes(2) > 4 * 60e6
    curve = machine.expert_curve(shape, torch.bfloat16, CUDA)
    assert curve.seconds[0] == pytest.approx(1 / (3 * shape.E * shape.H * shape.I))


def test_the_ceilings_of_a_gpu_are_timed_in_graphs(monkeypatch):
    timed = []
    monkeypatch.setattr(
        ceilings, "best_seconds", lambda run, repeats: timed.append((run, repeats)) or 0.25
    )
    call = lambda: pytest.fail("called outside a graph")
    assert ceilings._fastest(call, CUDA) == 0.25
    assert timed == [(call, ceilings.ROUNDS)]


def test_the_ceilings_of_a_gpu_are_cold_and_quick():
    size, side = ceilings.READ_BYTES["cuda"], ceilings.SQUARES["cuda"][-1][0]
    assert size // 2 >= 4 * 60e6, "each half of the copy is beyond an L2 cache"
    runs = 4 + ceilings.ROUNDS  # to warm up, to capture, to replay
    reads, products = 4 * size / 3e12, 2 * side**3 * (1 / 5e13 + 2 / 7e14)
    assert runs * (reads + products) < 1.0, "seconds on an H100, by count"
