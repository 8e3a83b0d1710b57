"""Every drafter of the table, loaded from paths: greedy output is the target's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.eagle_reference import LAYER, H, random_layer, save
from support.heads.mtp import save_with_heads
from support.tiny import (
    MOE_VOCAB,
    greedy_reference,
    ragged_prompts,
    save_tokenizer,
    tiny_model,
    tiny_moe,
)

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import DRAFTERS
from decoder.errors import UserError

torch.set_num_threads(1)

PROMPTS = ragged_prompts(5, seed=3)
NEW = 12


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, and the drafts of the kinds that need one; fp64, so that batch shapes agree."""
    root = tmp_path_factory.mktemp("paths")
    draft = tiny_model("llama", dtype=torch.float64, vocab_size=MOE_VOCAB, num_hidden_layers=1)
    for name, model in (("target", tiny_moe()), ("independent", draft)):
        model.save_pretrained(root / name)
        save_tokenizer(root / name, [f"w{i}" for i in range(MOE_VOCAB)])
    torch.manual_seed(0)
    weights = {"fc.weight": torch.randn(H, 2 * H), **random_layer("layers.0", H, 2)}
    save(root / "eagle", LAYER, weights)
    save_with_heads(root / "mtp", tiny_moe(), "deepseek")
    save_tokenizer(root / "mtp", [f"w{i}" for i in range(MOE_VOCAB)])
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    model = tiny_moe()
    return [greedy_reference(model, prompt, NEW) for prompt in PROMPTS]


def load(paths: dict[str, Path], **options: Any) -> SpeculativeDecoder:
    options = {"experts": "eager", "kernels": False, "device": "cpu"} | options
    return SpeculativeDecoder.from_paths(
        paths["target"], max_batch_size=3, max_length=64, **options
    )


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_output_is_the_targets_own(name, paths, expected):
    decoder = load(paths, drafter=name, draft=paths.get(name), gamma=3)
    for _ in range(2):  # replay records what it drafts the second time
        outputs = decoder.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
        assert [output.token_ids for output in outputs] == expected
    assert decoder.runner.dtype == torch.float64
    assert (decoder.stats.alpha is None) == (name == "none")


def test_a_checkpoint_that_carries_heads_needs_no_draft(paths, expected):
    decoder = load({"target": paths["mtp"]}, drafter="mtp", gamma=3)
    outputs = decoder.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
    assert [output.token_ids for output in outputs] == expected
    assert decoder.stats.drafted > 0


def test_from_paths_brings_the_tokenizer_and_chooses_by_the_draft(paths):
    decoder = load(paths, draft=paths["independent"])
    assert decoder.drafter.name == "independent" and load(paths).drafter.name == "ngram"
    (output,) = decoder.generate(["w7 w8"], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert output.text.split() == [f"w{i}" for i in output.token_ids]
    assert load(paths, dtype="fp32").runner.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of auto, bf16, .*got 'int3'"),
        ({"drafter": "eagle"}, "drafter 'eagle' needs a draft"),
        ({"draft": "/no/draft"}, "draft path '/no/draft' does not exist"),
    ],
)
def test_from_paths_refuses(paths, options, message):
    with pytest.raises(UserError, match=message):
        load(paths, **options)


def test_the_constructor_refuses_paths_and_says_what_takes_them(paths):
    with pytest.raises(UserError, match=r"loaded causal LM, got str '/a/b'; .*from_paths loads"):
        SpeculativeDecoder("/a/b")
    with pytest.raises(UserError, match=r"Drafter or None, got str; .*from_paths takes paths"):
        SpeculativeDecoder(tiny_moe(), str(paths["independent"]), kernels=False)
