"""Which builds of the real model's parts stay in the cache when a newer one has been made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_smol import H, ship_tiny, vocabulary

from decoder import smol
from decoder.checkpoint.weights import weight_files
from decoder.model import kernels
from decoder.smol import build
from decoder.smol.head import read_head, write_head
from decoder.smol.recipe import Recipe

pytest.importorskip("gguf", reason="the tiny model's file is written with it")


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """Of a tiny model, in a cache of its own; a head of it has been built that nothing uses."""
    made = ship_tiny(tmp_path, monkeypatch)
    os.utime(made.place("eagle"), (1, 1))
    return made


def heads(recipe: Recipe) -> list[Path]:
    """The builds of it that are there."""
    place = recipe.place("eagle")
    return [other for other in place.parent.glob("eagle-*") if len(other.name) == len(place.name)]


def build_heads(recipe: Recipe, norms: list[float]) -> list[Path]:
    """Build the parts again for each of some heads; the folders of the heads."""
    state, config = read_head(recipe.asset("eagle"), torch.zeros(len(vocabulary()[0]), H))
    places = []
    for norm in norms:
        write_head(recipe.asset("eagle"), state | {"norm.weight": torch.full((H,), norm)}, config)
        build.record(recipe)
        places.append(recipe.place("eagle"))
    return places


def test_a_new_build_drops_those_before_the_last(recipe) -> None:
    foreign = recipe.place("eagle").with_name("eagle-of-mine")
    foreign.mkdir()
    places = build_heads(recipe, [1.0, 2.0, 3.0])
    assert [place.is_dir() for place in places] == [False, True, True]
    assert foreign.is_dir()
    os.utime(places[1], (1, 1))
    build_heads(recipe, [2.0])  # there already: nothing is built, so nothing is dropped
    assert places[2].is_dir()
    assert len(heads(recipe)) == 2


def test_what_a_process_uses_is_never_dropped(recipe) -> None:
    used = smol.eagle_path()
    os.utime(used, (1, 1))
    *_, latest = build_heads(recipe, [1.0, 2.0, 3.0])
    assert used.is_dir()
    assert latest.is_dir()
    assert len(heads(recipe)) == 3


def test_what_was_used_last_stays_not_what_was_built_last(recipe) -> None:
    first, second = build_heads(recipe, [1.0, 2.0])
    os.utime(second, (1, 1))
    build_heads(recipe, [3.0])
    assert (first.is_dir(), second.is_dir()) == (True, False)


def test_what_is_dropped_between_two_looks_is_built_again(recipe, monkeypatch) -> None:
    place = smol.eagle_path()
    is_there = kernels.cache().keep
    dropped = iter([True])

    def keep(folder: Path) -> bool:
        if next(dropped, False):
            shutil.rmtree(folder)
        return is_there(folder)

    monkeypatch.setattr(kernels.cache(), "keep", keep)
    assert smol.eagle_path() == place
    assert weight_files(place)
