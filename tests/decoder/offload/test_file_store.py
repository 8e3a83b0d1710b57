"""What is read, what is kept, and what goes wrong on the way."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.offload import Run, simulated_misses

from decoder.checkpoint.weights import tensor_headers
from decoder.errors import UserError
from decoder.offload.file_store import FileStore
from decoder.offload.files import OpenFiles, tensor_extents
from decoder.offload.layout import Layout, Projection

LAYERS, EXPERTS = 3, 8
SHAPES = {"gate_up_proj": (EXPERTS, 64, 32), "down_proj": (EXPERTS, 32, 64)}  # whole pages


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experts of three layers."""
    path = tmp_path_factory.mktemp("store") / "model.safetensors"
    names = [f"{layer}.{name}" for layer in range(LAYERS) for name in SHAPES]
    generator = torch.Generator().manual_seed(3)
    shapes = {name: SHAPES[name.partition(".")[2]] for name in names}
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, path)
    return path


def layout_of(file: Path) -> Layout:
    extents = tensor_extents([file])
    assert extents.keys() == tensor_headers([file]).keys()

    def projection(layer: int, name: str) -> Projection:
        whole = extents[f"{layer}.{name}"]
        experts = [(whole.nth(expert, EXPERTS),) for expert in range(EXPERTS)]
        return Projection(name, SHAPES[name], torch.float32, experts)

    return {str(layer): [projection(layer, name) for name in SHAPES] for layer in range(LAYERS)}


SIZE = sum(4 * torch.Size(shape).numel() for shape in SHAPES.values()) // EXPERTS


def store_of(file: Path, places: int, prefetch: bool = False) -> FileStore:
    return FileStore(layout_of(file), places * SIZE, prefetch)


def random_runs(steps: int, spread: int, seed: int = 0) -> list[Run]:
    """Steps over all layers whose tokens visit up to ``spread`` experts, some more than others."""
    draw = random.Random(seed)
    weights = [2.0**-expert for expert in range(EXPERTS)]
    return [
        (layer, draw.choices(range(EXPERTS), weights, k=spread))
        for _ in range(steps)
        for layer in range(LAYERS)
    ]


def decode(store: FileStore, runs: list[Run], truth: dict[str, torch.Tensor]) -> None:
    """Runs of layers, in each of which the experts in use must hold what the file does."""
    for layer, ids in runs:
        with store.resident(layer, torch.tensor(ids).view(1, -1)):
            for name, tensor in store.weights[layer].items():
                for expert in set(ids) & set(range(EXPERTS)):
                    assert torch.equal(tensor[expert], truth[f"{layer}.{name}"][expert])


@pytest.fixture(scope="module")
def truth(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("places", [8, 11, 17, 24])
@pytest.mark.parametrize("spread", [1, 4, 40])
def test_each_missing_expert_is_read_once(file, truth, places, spread, monkeypatch):
    read: list[int] = []
    original = OpenFiles.read

    def counted(self: OpenFiles, extent: Any, into: memoryview) -> None:
        read.append(extent.size)
        original(self, extent, into)

    monkeypatch.setattr(OpenFiles, "read", counted)
    runs = random_runs(12, spread)
    store = store_of(file, places)
    decode(store, runs, truth)
    misses = simulated_misses(runs, LAYERS, places)
    assert store.stats.missed == misses
    assert store.stats.bytes_read == misses * SIZE == sum(read)
    assert store.stats.needed == sum(len(set(ids)) for _, ids in runs)
    if places == LAYERS * EXPERTS:
        assert misses == len({(layer, expert) for layer, ids in runs for expert in ids})


def test_steps_that_use_everything_find_what_fits_beside_a_layer(file, truth):
    """By time, the least recently used expert is always the next one needed: nothing would hit."""
    store = store_of(file, 12)
    everything: list[Run] = [(layer, range(EXPERTS)) for layer in range(LAYERS)]
    decode(store, 4 * everything, truth)
    store.begin()
    decode(store, 4 * everything, truth)
    # What stays beside the layer that runs is met once per round of the other layers.
    hits = (12 - EXPERTS) * 4 * LAYERS // (LAYERS - 1)
    assert store.stats.needed - store.stats.missed == hits
    assert store.stats.hit_rate == hits / (4 * LAYERS * EXPERTS)


def test_memory_that_an_expert_gives_up_is_empty(file, truth):
    store = store_of(file, 8)
    decode(store, [(0, range(EXPERTS)), (1, range(EXPERTS))], truth)
    assert all(not tensor.any() for tensor in store.weights[0].values())
    assert all(tensor.any() for tensor in store.weights[1].values())


def test_ids_outside_the_layer_stand_for_no_expert(file, truth):
    store = store_of(file, 8)
    decode(store, [(0, [-1, 8, 10**6, 2])], truth)
    assert (store.stats.needed, store.stats.missed) == (1, 1)


@pytest.mark.parametrize("places", [9, 16, 24])
def test_hints_that_come_true_are_read_ahead(file, truth, places):
    steps: list[Run] = [(layer, [0, 1, 2, 3, 3, 4, 5]) for layer in range(LAYERS)]
    store, plain = (store_of(file, places, prefetch) for prefetch in (True, False))
    for one in (store, plain):
        decode(one, 12 * steps, truth)
    stats = store.stats
    assert stats.bytes_read == (stats.missed + stats.prefetched) * SIZE
    assert stats.needed == plain.stats.needed
    if places == 24:  # everything is there
        assert (stats.prefetched, stats.missed) == (0, plain.stats.missed)
    else:
        assert 0 < stats.useful <= stats.prefetched <= stats.useful + places // 4
        assert stats.missed < plain.stats.missed


def test_hints_that_do_not_come_true_are_not_followed(file, truth):
    """Tokens that alternate between two halves of the experts."""
    halves: list[Run] = [
        (layer, [0, 1, 2, 3] if step % 2 else [4, 5, 6, 7])
        for step in range(20)
        for layer in range(LAYERS)
    ]
    store = store_of(file, 9, prefetch=True)
    decode(store, halves, truth)
    assert store.stats.prefetched == 0


def test_a_budget_below_a_layer_is_refused_with_what_it_takes(file):
    with pytest.raises(UserError, match=r"at least 0.000131 GB, one layer's 8 .* got 0.000115 GB"):
        store_of(file, 7)


def copied(file: Path, folder: Path) -> Path:
    copy = folder / file.name
    copy.write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("change", ["cut off", "written to"])
def test_a_file_that_changes_is_noticed(file, truth, tmp_path, change):
    copy = copied(file, tmp_path)
    store = store_of(copy, 8)
    decode(store, [(0, [1, 2])], truth)
    if change == "cut off":
        os.truncate(copy, 4000)
    else:
        with copy.open("r+b") as opened:
            opened.write(b"\1")
    for _ in range(2):  # nothing of it is taken for read
        with pytest.raises(UserError, match=r"model.safetensors has changed since"):
            decode(store, [(1, [3])], truth)
    decode(store, [(0, [1, 2])], truth)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_file_that_is_deleted_or_replaced_is_read_as_it_was(file, truth, tmp_path, change):
    copy = copied(file, tmp_path)
    store = store_of(copy, 8)
    if change == "deleted":
        copy.unlink()
    else:
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").rename(copy)
    decode(store, random_runs(2, 4), truth)


def test_a_short_read_is_an_error(file, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with (
        pytest.raises(UserError, match=r"ends before byte"),
        store_of(file, 8).resident(0, torch.tensor([0])),
    ):
        pass


def test_an_interrupt_loses_nothing(file, truth, monkeypatch):
    store, runs = store_of(file, 11), random_runs(8, 4)
    original = Future.exception

    def interrupted(self: Future[None], timeout: float | None = None) -> Any:
        monkeypatch.setattr(Future, "exception", original)
        raise KeyboardInterrupt

    for place in (1, 5, 9, 14):
        decode(store, runs[:place], truth)
        monkeypatch.setattr(Future, "exception", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode(store, random_runs(8, 4, seed=place + 1), truth)
    decode(store, runs, truth)


def test_a_store_given_up_while_it_reads_closes_its_files(file, tmp_path, monkeypatch):
    going, may_end = threading.Event(), threading.Event()
    preadv = os.preadv

    def slow(*arguments: Any) -> int:
        going.set()
        may_end.wait(10)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    copy = copied(file, tmp_path)
    store = store_of(copy, 9)
    store._start((0, 1))
    assert going.wait(10)
    threading.Timer(0.1, may_end.set).start()
    del store
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert str(copy) not in opened


def test_what_is_read_leaves_the_page_cache(file, monkeypatch):
    """Every byte read lies in pages that the kernel was told to drop after the read."""
    asked: list[tuple[int, int]] = []
    dropped: list[tuple[int, int]] = []
    preadv, fadvise = os.preadv, os.posix_fadvise

    def note_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        asked.append((offset, offset + count))
        return count

    def note_advice(descriptor: int, start: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((start, start + length))
        fadvise(descriptor, start, length, advice)

    monkeypatch.setattr(os, "preadv", note_read)
    monkeypatch.setattr(os, "posix_fadvise", note_advice)
    with store_of(file, 8).resident(1, torch.tensor([2, 5])):
        pass
    assert len(asked) == 2 * len(SHAPES)
    assert all(any(s <= a and b <= e for s, e in dropped) for a, b in asked)
