"""What a user may say to get a drafter, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.eagle_reference import LAYER, H, random_layer, save
from support.tiny import tiny_model
from torch import ones

from decoder.drafters import (
    Drafter,
    HybridDrafter,
    NgramDrafter,
    NoDrafter,
    ReplayDrafter,
    SelfDrafter,
    build_drafter,
)
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.errors import UserError


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("spec", "kind"),
    [(None, NoDrafter), ("none", NoDrafter), ("ngram", NgramDrafter), ("self", SelfDrafter)],
)
def test_names(target: Any, spec: str | None, kind: type) -> None:
    drafter = build_drafter(spec, target)
    assert isinstance(drafter, kind)
    assert isinstance(drafter, Drafter)


def test_objects(target: Any) -> None:
    replay = ReplayDrafter(0.5)
    assert build_drafter(replay, target) is replay
    model = build_drafter(tiny_model("llama", num_hidden_layers=1), target, kernels=False)
    assert isinstance(model, IndependentDrafter)


def test_paths_are_told_apart(target: Any, tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    model = build_drafter(str(tmp_path / "model"), target, kernels=False)
    assert isinstance(model, IndependentDrafter)
    tensors = random_layer("layers.0", H, 0) | {"fc.weight": ones(H, 2 * H)}
    head = save(tmp_path / "head", LAYER, tensors, False)
    assert isinstance(build_drafter(head, target, kernels=False), EagleDrafter)


def test_options(target: Any) -> None:
    ngram = build_drafter("ngram", target, max_ngram=6, min_ngram=3)
    assert isinstance(ngram, NgramDrafter) and (ngram.max_ngram, ngram.min_ngram) == (6, 3)
    drafter = build_drafter("self", target, self_top_k=2)
    assert isinstance(drafter, SelfDrafter) and drafter.top_k == 2
    hybrid = build_drafter("self", target, ngram_threshold=3)
    assert isinstance(hybrid, HybridDrafter) and hybrid.name == "self+ngram"


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("/no/such/draft", {}, r"'/no/such/draft' is neither a directory nor one of 'none'"),
        ("ngram", {"kind": "medusa"}, "must be one of auto, none, ngram.*got 'medusa'"),
        (3.5, {}, "must be a name, a path, a causal LM or a Drafter, got float"),
    ],
)
def test_refusals(target: Any, spec: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_drafter(spec, target, **options)


def test_directory_without_a_model(target: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load model"):
        build_drafter(tmp_path, target)
