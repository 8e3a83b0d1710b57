"""The draft whose scales are tuned: other scales, the same codes, everything else untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_smol import H, I, ship_tiny

from decoder import smol
from decoder.errors import UserError
from decoder.model.loading import load_model
from decoder.smol import build
from decoder.smol.gguf_file import DenseFile
from decoder.smol.recipe import Recipe
from decoder.smol.tuned import TUNED_FILE, write_changes, write_tuned

pytest.importorskip("gguf", reason="the tiny model's file is written with it")

NAMES = {"blk.0.ffn_down.weight": (H, I // 32), "blk.3.ffn_gate.weight": (I, H // 32)}
THEIRS = {
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.3.ffn_gate.weight": "model.layers.3.mlp.gate_proj.weight",
}


@pytest.fixture
def changes() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return {
        name: (0.1 * torch.randn(shape), 0.01 * torch.randn(shape)) for name, shape in NAMES.items()
    }


@pytest.fixture
def tiny(tmp_path, monkeypatch, changes) -> Recipe:
    recipe = ship_tiny(tmp_path, monkeypatch, "Q4_1")
    write_changes(recipe.assets / "draft.safetensors", changes)
    build.record(recipe)
    return recipe


def test_blocks_grow_and_move_as_was_trained(tiny, changes) -> None:
    before = DenseFile(tiny.file).weights()
    after = DenseFile(smol.draft_path() / TUNED_FILE).weights()
    for name, (scale, least) in changes.items():
        blocks = before[THEIRS[name]].unflatten(1, (-1, 32))
        wanted = (blocks * (1 + scale[..., None]) + least[..., None]).flatten(1)
        found = after.pop(THEIRS[name])
        # Changes are kept in 4 bits, scales in half precision.
        moved = (wanted - before[THEIRS[name]]).norm()
        assert (found - wanted).norm() < 0.12 * moved
        assert len(found.unflatten(1, (-1, 32))[0, 0].unique()) <= 16
    for name, weight in after.items():
        assert torch.equal(weight, before[name]), name


def test_the_folder_holds_the_files_weights(tiny) -> None:
    weights = DenseFile(smol.draft_path() / TUNED_FILE).weights()
    for name, weight in load_model(smol.draft_path()).state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(weight, weights[name].bfloat16()), name


def test_a_cpu_drafts_from_the_tuned_file(tiny) -> None:
    packed = smol.draft_of("auto", "cpu", kernels=True)
    assert packed == smol.draft_path() / TUNED_FILE
    tiny.file.unlink()  # a folder outlives its package
    assert smol.draft_of("auto", "cpu", kernels=True) == packed
    assert smol.draft_of("auto", "cpu", "fp32", kernels=True) == smol.draft_path()


def test_other_changes_make_another_draft(tiny, changes) -> None:
    before = smol.draft_path(), smol.target_path()
    write_changes(tiny.assets / "draft.safetensors", dict(list(changes.items())[:1]))
    build.record(tiny)
    assert smol.draft_path() != before[0]
    assert smol.target_path() == before[1]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (H, 1)),
        ("blk.9.ffn_down.weight", (H, I // 32)),
        ("blk.0.ffn_down.weight", (H, 1)),
    ],
    ids=["not packed", "not there", "too few"],
)
def test_changes_of_something_else_are_refused(tiny, tmp_path: Path, name, shape) -> None:
    file = tmp_path / "other.safetensors"
    write_changes(file, {name: (torch.ones(shape), torch.ones(shape))})
    with pytest.raises(UserError, match=f"changes of Q4_1 tensors of .*, got {name}"):
        write_tuned(tiny.file, file, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
