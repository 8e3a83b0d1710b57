"""What a user may say to get a drafter, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.eagle_reference import LAYER, H, random_layer, save
from support.tiny import tiny_model
from torch import ones

from decoder.drafters import (
    DRAFTERS,
    Drafter,
    DraftOptions,
    HybridDrafter,
    NgramDrafter,
    NoDrafter,
    ReplayDrafter,
    SelfDrafter,
    SuffixDrafter,
    build_drafter,
)
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.drafters.mtp import MtpDrafter
from decoder.drafters.table import checked_drafter, drafter_names
from decoder.errors import UserError

PLAIN = DraftOptions(kernels=False)


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each kind of drafter that needs one."""
    root = tmp_path_factory.mktemp("drafts")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(root / "model")
    tensors = random_layer("layers.0", H, 0) | {"fc.weight": ones(H, 2 * H)}
    head = save(root / "head", LAYER, tensors)
    return {"independent": root / "model", "eagle": head}


CLASSES = {
    "none": NoDrafter,
    "ngram": NgramDrafter,
    "suffix": SuffixDrafter,
    "self": SelfDrafter,
    "independent": IndependentDrafter,
    "eagle": EagleDrafter,
    "mtp": MtpDrafter,
    "replay": ReplayDrafter,
}


@pytest.mark.parametrize("name", [name for name in drafter_names() if name != "auto"])
def test_every_name_of_the_table_makes_a_drafter(
    target: Any, drafts: dict[str, Path], name: str
) -> None:
    kind = next(k for k in DRAFTERS.values() if name in (k.name, *k.aliases))
    drafter = build_drafter(name, target, drafts.get(kind.name), PLAIN)
    assert isinstance(drafter, CLASSES[kind.name])
    assert isinstance(drafter, Drafter)


def test_auto_is_what_the_draft_is_or_lookup(target: Any, drafts: dict[str, Path]) -> None:
    assert isinstance(build_drafter("auto", target), NgramDrafter)
    for kind, path in drafts.items():
        assert isinstance(build_drafter("auto", target, str(path), PLAIN), CLASSES[kind])


def test_objects(target: Any) -> None:
    replay = ReplayDrafter(0.5)
    assert build_drafter(replay, target) is replay
    assert isinstance(build_drafter(None, target), NoDrafter)
    draft = tiny_model("llama", num_hidden_layers=1)
    for given in ((draft, target, None), ("independent", target, draft)):
        assert isinstance(build_drafter(*given, options=PLAIN), IndependentDrafter)


def test_mtp_reads_a_folder_or_the_targets_own(target: Any, drafts: dict[str, Path]) -> None:
    for draft in (None, drafts["eagle"]):
        drafter = build_drafter("mtp", target, draft, PLAIN)
        assert isinstance(drafter, MtpDrafter) and drafter.folder == draft
    with pytest.raises(UserError, match="draft of 'mtp' must be a folder, got LlamaForCausalLM"):
        build_drafter("mtp", target, target, PLAIN)


def test_replay_runs_a_draft_for_its_cost(target: Any, drafts: dict[str, Path]) -> None:
    options = DraftOptions(kernels=False, replay_alpha=0.3)
    replay = build_drafter("replay", target, drafts["eagle"], options)
    assert isinstance(replay, ReplayDrafter) and replay.alpha == 0.3
    assert isinstance(replay.cost, EagleDrafter)


def test_options(target: Any) -> None:
    ngram = build_drafter("ngram", target, options=DraftOptions(max_ngram=6, min_ngram=3))
    assert isinstance(ngram, NgramDrafter) and (ngram.max_ngram, ngram.min_ngram) == (6, 3)
    options = DraftOptions(
        max_tree_depth=9, max_cached_requests=8, max_spec_factor=3.0, min_token_prob=0.5
    )
    suffix = build_drafter("suffix", target, options=options)
    assert isinstance(suffix, SuffixDrafter)
    assert (suffix.max_tree_depth, suffix.max_cached_requests) == (9, 8)
    assert (suffix.max_spec_factor, suffix.min_token_prob) == (3.0, 0.5)
    drafter = build_drafter("self", target, options=DraftOptions(self_top_k=2))
    assert isinstance(drafter, SelfDrafter) and drafter.top_k == 2
    hybrid = build_drafter("self", target, options=DraftOptions(ngram_threshold=3))
    assert isinstance(hybrid, HybridDrafter) and hybrid.name == "self+ngram"


def test_each_option_is_a_field_that_some_kind_reads() -> None:
    read = {name for kind in DRAFTERS.values() for name in kind.options}
    assert read | {"kernels", "tokenizer"} == set(DraftOptions.__dataclass_fields__)


@pytest.mark.parametrize(
    ("drafter", "draft", "message"),
    [
        ("auto", "/no/such/draft", "draft path '/no/such/draft' does not exist"),
        ("eagle", "/no/such/draft", "draft path '/no/such/draft' does not exist"),
        ("ngram", "/no/such/draft", "draft path '/no/such/draft' does not exist"),
        ("eagle3", None, r"drafter 'eagle3' needs a draft \(--draft\), got none"),
        ("medusa", None, "must be one of auto, none, ngram.*got 'medusa'; a draft model's path"),
        ("mtp", "/no/such/draft", "draft path '/no/such/draft' does not exist"),
        (3.5, None, "draft must be a path or a causal LM, got float"),
    ],
)
def test_refusals(target: Any, drafter: Any, draft: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_drafter(drafter, target, draft)


def test_directory_without_a_model(target: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an empty folder"):
        build_drafter("auto", target, tmp_path)


def test_a_decoder_is_given_drafters_only() -> None:
    assert isinstance(checked_drafter(None), NoDrafter)
    with pytest.raises(UserError, match=r"got str; SpeculativeDecoder.from_paths takes paths"):
        checked_drafter("ngram")  # type: ignore[arg-type]
