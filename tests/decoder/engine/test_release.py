"""A decoder that goes out of scope is freed then and there, without the garbage collector.

Two decoders beside a large model do not fit a GPU, and capturing a graph collects nothing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.eagle_reference import LAYER, H, random_layer, save
from support.tiny import ragged_prompts, tiny_moe

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import NgramDrafter, ReplayDrafter, SelfDrafter, SuffixDrafter
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.model import capture
from decoder.model.runner import ModelRunner

F32 = torch.float32
PARTS = ("runner", "cache", "sampler", "drafter", "cost", "model", "head", "_reduced", "_lean")
PARTS += ("_graphs", "_batch", "_table", "_adjustments", "ragged_layers")


def eagle(folder: Path) -> EagleDrafter:
    weights = {"fc.weight": torch.randn(H, 2 * H), **random_layer("layers.0", H, 2)}
    return EagleDrafter(save(folder, LAYER, weights))


def independent() -> IndependentDrafter:
    return IndependentDrafter(tiny_moe(seed=1, layers=1, dtype=F32))


DRAFTERS: dict[str, Callable[[Path], Any]] = {
    "none": lambda _: None,
    "ngram": lambda _: NgramDrafter(),
    "suffix": lambda _: SuffixDrafter(),
    "self": lambda _: SelfDrafter(),
    "independent": lambda _: independent(),
    "eagle": eagle,
    "replay": lambda _: ReplayDrafter(0.8, cost=independent()),
    "replay of eagle": lambda folder: ReplayDrafter(0.8, cost=eagle(folder)),
}


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def parts(thing: Any, path: str, found: dict[str, Any], kept: list[Any]) -> dict[str, Any]:
    """Weak references to what ``thing`` is made of, by path, but for what others own."""
    for name in PARTS:
        part = getattr(thing, name, None)
        owned = part is not None and all(part is not other for other in kept)
        if owned and f"{path}.{name}".count(".") < 5:
            for item in part if isinstance(part, list) else [part]:
                found[f"{path}.{name}"] = weakref.ref(item)
                parts(item, f"{path}.{name}", found, kept)
    return found


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_released_decoder_leaves_nothing_behind(name, static, tmp_path):
    target = tiny_moe(dtype=F32)
    for kernels, attention in ((False, "portable"), (True, "auto")):
        drafter = DRAFTERS[name](tmp_path)
        options = {"static": static, "kernels": kernels, "attention": attention}
        engine = SpeculativeDecoder(target, drafter, 3, max_batch_size=3, max_length=60, **options)
        engine.generate(ragged_prompts(5), SamplingParams(max_new_tokens=10))
        kept = [target, target.get_output_embeddings()]
        found = parts(engine, "decoder", {"decoder": weakref.ref(engine)}, kept)
        assert "decoder.runner.cache.ragged_layers" in found and "decoder.sampler" in found
        del engine, drafter
        assert [path for path, ref in found.items() if ref() is not None] == []
    hooks = [module for module in target.modules() if module._forward_pre_hooks]
    assert hooks == [], "the model is as it was"


@pytest.mark.usefixtures("uncollected")
def test_a_released_runner_leaves_no_graph_behind(monkeypatch):
    runner = ModelRunner(tiny_moe(dtype=F32), 2, 40, attention="portable", static=True)
    graphs, shared = fake_capture(monkeypatch)
    runner._graphs._calls.capture = True
    for queries in (1, 2):
        positions = torch.arange(queries)[None]
        for _ in range(3):
            runner.forward(torch.full_like(positions, 7), torch.zeros(1).long(), positions)
    assert [graph().replays for graph in graphs] == [3, 3]
    assert shared == [(None, 0), ((0, 1), 0)], "the pool of the first, on the one stream there is"
    del runner
    assert [graph() for graph in graphs] == [None, None]


def test_a_graph_is_captured_on_the_device_of_its_model(monkeypatch):
    runner = ModelRunner(tiny_moe(dtype=F32), 2, 40, attention="portable", static=True)
    fake_capture(monkeypatch)
    runner._graphs._calls.capture = True
    position = torch.zeros(1, 1).long()
    runner.forward(position, torch.zeros(1).long(), position)
    assert list(capture._STREAMS) == [str(runner.device)]


def test_a_step_that_cannot_be_captured_says_what_to_do(monkeypatch):
    runner = ModelRunner(tiny_moe(dtype=F32), 2, 40, attention="portable", static=True)
    fake_capture(monkeypatch)
    runner._graphs._calls.capture = True

    def waits(*args: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(runner, "run", waits)
    position = torch.zeros(1, 1).long()
    with pytest.raises(RuntimeError, match="synchronizing") as caught:
        runner.forward(position, torch.zeros(1).long(), position)
    assert "static=False" in caught.value.__notes__[0]


def fake_capture(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """A CPU's stand-in for ``torch.cuda``'s capture; replaying counts and computes nothing.

    Returns:
        What is appended to: weak references to the graphs; pool and number of stream of each.
    """
    graphs: list[Any] = []
    shared: list[Any] = []
    streams: list[Any] = []
    current = ["another device"]

    class Graph:
        replays = 0

        def __init__(self) -> None:
            graphs.append(weakref.ref(self))

        def pool(self) -> tuple[int, int]:
            return (0, 1)

        def replay(self) -> None:
            self.replays += 1

    class Nothing:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    def graph(graph: Any, pool: Any, stream: Any) -> Nothing:
        shared.append((pool, streams.index(stream)))
        return Nothing()

    @contextmanager
    def of_device(device: Any) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    def new_stream() -> Any:
        streams.append(SimpleNamespace(wait_stream=lambda other: None))
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(capture, "_STREAMS", {})
    monkeypatch.setattr(torch.cuda, "device", of_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=print))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Nothing())
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    return graphs, shared
