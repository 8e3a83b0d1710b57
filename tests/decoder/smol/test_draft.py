"""The real model's draft: the package's own file where its blocks are run as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_smol import ship_tiny

from decoder import smol
from decoder.cli.arguments import draft_path, parse
from decoder.cli.options import OneLineParser, add_model_arguments
from decoder.cli.setup import Setup
from decoder.requests.params import SamplingParams
from decoder.smol.recipe import Recipe

pytest.importorskip("gguf", reason="the tiny model's file is written with it")

PACKED: dict[str, Any] = {"device": "cpu", "dtype": "auto", "kernels": True}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Recipe:
    return ship_tiny(tmp_path, monkeypatch, "Q4_1")


def test_a_cpu_drafts_from_the_blocks(tiny) -> None:
    for drafter in ("auto", "independent"):
        assert smol.draft_of(drafter, **PACKED) == tiny.file
        for name in ("bf16", "bfloat16", torch.bfloat16):
            assert smol.draft_of(drafter, **PACKED | {"dtype": name}) == tiny.file
    assert smol.draft_of("eagle", **PACKED) == smol.eagle_path()
    assert smol.draft_of("ngram", **PACKED) is None


@pytest.mark.parametrize(
    "other",
    [
        {"device": "cuda"},
        {"device": torch.device("cuda", 1)},
        {"dtype": "float16"},
        {"dtype": torch.float32},
        {"kernels": False},
    ],
    ids=str,
)
def test_what_would_unpack_them_takes_the_folder(tiny, other) -> None:
    assert smol.draft_of("auto", **PACKED | other) == smol.draft_path()


def test_without_products_of_integers_or_the_package_it_is_the_folder(tiny, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(smol, "multiplies_integers", lambda: False)
        assert smol.draft_of("auto", **PACKED) == smol.draft_path()
    tiny.file.write_bytes(b"another release")
    assert smol.draft_of("auto", **PACKED) == smol.draft_path()


@pytest.mark.parametrize("there", ["cpu", "cuda"])
def test_the_device_is_the_default_one(tiny, monkeypatch, there) -> None:
    monkeypatch.setattr(smol, "default_device", lambda: torch.device(there))
    packed = smol.draft_of("auto", None, kernels=True) == tiny.file
    assert packed is (there == "cpu")


def parsed(*flags: str) -> Any:
    parser = OneLineParser(prog="t")
    add_model_arguments(parser)
    parser.set_defaults(chat_template=None)
    return parse(parser, ["--target", "smol", "--device", "cpu", *flags])


def test_flags_decide(tiny, tmp_path) -> None:
    def of(*flags: str) -> str | Path | None:
        return draft_path(parsed(*flags), "smol")

    assert of() == of("--drafter", "draft_model") == of("--ngram-threshold", "3") == tiny.file
    for flags in (
        ("--dtype", "fp32"),
        ("--draft-dtype", "int4"),
        ("--experts-implementation", "eager"),
    ):
        assert of(*flags) == smol.draft_path()
    for mine in (tmp_path, tiny.file):
        assert of("--draft", str(mine), "--dtype", "fp32") == str(mine)


def test_its_outputs_are_the_targets_own(tiny) -> None:
    setup = Setup(parsed("--gamma", "3", "--batch-size", "2"))
    plain, speculative = setup.pair()
    model = speculative.drafter.model
    assert model.get_output_embeddings().weight_format == "q4_1"
    assert model.model.layers[0].mlp.down_proj.weight_format == "q4_1"
    prompts = ["12 é", "    a\n"]
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    expected, outputs = (decoder.generate(prompts, params) for decoder in (plain, speculative))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert speculative.stats.alpha > 0.5, "it is the model that the target was made from"
