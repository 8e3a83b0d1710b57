"""Which draft a trained pair is measured with, and what its lines say of it."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from support.tiny_smol import ship_tiny

from bench.workloads.trained import TrainedPair
from decoder import smol
from decoder.drafters import build_drafter
from decoder.drafters.vocab import vocabulary_mismatch
from decoder.model.loading import load_tokenizer

pytest.importorskip("gguf", reason="the tiny model's file is written with it")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    return ship_tiny(tmp_path, monkeypatch, "Q4_1")


def flags(**changed: str) -> Namespace:
    usual = {"preset": "smol", "drafter": "auto", "dtype": "bfloat16", "device": "cpu"}
    return Namespace(**usual | changed)


def test_the_real_pair_drafts_from_the_packages_file(tiny):
    pair = TrainedPair.of_flags(flags())
    assert (pair.name, pair.drafter, pair.draft) == ("smol", "independent", tiny.file)
    assert vocabulary_mismatch(pair.load_tokenizer(), load_tokenizer(pair.draft)) is None
    target = pair.load_target(torch.bfloat16, "cpu")
    for draft in (pair.load_draft(target), build_drafter(pair.drafter, target, pair.draft).model):
        assert draft.get_output_embeddings().weight_format == "q4_1"
        assert draft.dtype == target.dtype


def test_in_other_numbers_or_another_program_it_drafts_from_the_folder(tiny):
    for pair in (
        TrainedPair.of_flags(flags(dtype="float32")),
        TrainedPair.of_flags(flags(device="cuda")),
        TrainedPair.of_preset("smol", "independent"),
    ):
        assert pair.draft == smol.draft_path()


def test_numbers_may_be_called_as_elsewhere(tiny):
    assert TrainedPair.of_flags(flags(dtype="bf16")) == TrainedPair.of_flags(flags())


def test_the_small_pair_has_one_draft():
    ours = TrainedPair.of_flags(flags(preset="embedded"))
    assert ours == TrainedPair.of_preset("embedded", "auto")
    none = TrainedPair.of_flags(flags(preset="embedded", drafter="ngram"))
    assert none.draft is None
