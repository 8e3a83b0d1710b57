"""The captured stack on a pretended device: what is captured, and what a failed capture leaves.

The pretence keeps the order of what is asked of the device, and does as torch does where a capture
fails: its end raises, and the stream it captured on stays the current one.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from bench.measure.graph import CapturedStack, stack_size
from bench.workloads.layer import make_batch, make_layer
from bench.workloads.shapes import SHAPES, Shape
from decoder.model import capture

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 8, 8)
L2_BYTES = 60e6  # above an H100's and an H200's


class Device:
    """``torch.cuda`` as far as the stack needs it; ``log`` is what was asked of it, in order."""

    def __init__(self):
        self.log, self.current, self.mode, self.capturing = [], "default", 0, False

    def install(self, monkeypatch):
        for name in (
            *("device", "stream", "graph", "get_sync_debug_mode", "set_sync_debug_mode"),
            *("current_stream", "current_device", "_sleep", "Event", "Stream", "CUDAGraph"),
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(capture, "_ABANDONED", [])
        monkeypatch.setattr(capture, "_STREAMS", {})

    def note(self, text):
        self.log.append(text)
        return self

    def Stream(self):
        return Stream("side")

    def device(self, device):
        return nullcontext()

    def current_device(self):
        return 0

    def current_stream(self):
        return Stream(self.current)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, captured, pool, stream):
        self.current, self.capturing = stream.name, True
        try:
            yield
        except RuntimeError:
            self.capturing = False
            raise RuntimeError("capture was invalidated") from None
        self.current, self.capturing = "default", False

    def CUDAGraph(self):
        return Replayed(self)

    def Event(self, enable_timing):
        return Event(self)

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def _sleep(self, cycles):
        self.note("sleep")

    def wait(self):
        """What an operation that needs a value on the host does."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        assert not self.capturing, "a capture was begun that could not succeed"


class Stream:
    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        pass


class Replayed:
    def __init__(self, device):
        self.replay = lambda: device.note("replay")


class Event:
    def __init__(self, device):
        self.record = lambda: device.note("record")

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 6.0  # milliseconds


@pytest.fixture
def device(monkeypatch):
    device = Device()
    device.install(monkeypatch)
    return device


def stack_of(call, layers=3):
    made = [make_layer(SHAPE, torch.float32, CPU, seed) for seed in range(layers)]
    return CapturedStack(call, made, batch(0))


def batch(seed):
    return make_batch(SHAPE, 5, 1, "uniform", torch.float32, CPU, seed, 1.0)


def test_a_replay_takes_a_batch_a_layer_and_the_host_runs_ahead(device):
    captured = []

    def call(layer, *inputs):
        if device.capturing:
            captured.append((layer, inputs))

    stack = stack_of(call)
    batches = [batch(seed) for seed in (1, 2, 3)]
    assert stack.seconds(batches) == pytest.approx(0.002)  # a third of 6 ms
    assert device.log == ["sleep", "record", "replay", "record"]
    assert len({id(layer) for layer, _ in captured}) == 3
    for (_, inputs), given in zip(captured, batches, strict=True):
        wanted = given.hidden, given.topk_ids, given.topk_weights
        assert all(map(torch.equal, inputs, wanted))
    assert (device.current, device.mode) == ("default", 0)


def test_a_call_that_waits_for_the_device_is_refused_before_a_capture(device):
    with pytest.raises(RuntimeError, match="synchronizing"):
        stack_of(lambda layer, *inputs: device.wait())
    assert (device.current, device.mode) == ("default", 0)


def test_a_failed_capture_gives_the_stream_back_and_keeps_its_graph(device):
    def call(layer, *inputs):
        if device.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="invalidated"):
        stack_of(call)
    assert device.current == "default"
    assert len(capture._ABANDONED) == 1 and not capture._STREAMS


@pytest.mark.parametrize("name", ["qwen3-30b", "qwen2-57b", "mixtral", "olmoe", "deepseek-v3"])
def test_even_one_token_reads_more_than_l2_holds(name):
    shape = SHAPES[name]
    layers = stack_size(shape.E * shape.expert_bytes(2))
    others = (layers - 1) * shape.K * shape.expert_bytes(2)
    assert others > 2 * L2_BYTES  # read between two uses of the same weights
