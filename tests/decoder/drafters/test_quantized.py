"""Quantised targets and drafts: the target's own tokens, by the lean forward, and nobody's loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import random_prompts, tiny_model

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import DraftOptions, build_drafter
from decoder.embedded import draft_path, target_path
from decoder.errors import UserError
from decoder.model import kernels
from decoder.model.loading import load_model
from moesd_kernels import available_backends, quantize, use_int8_activations
from moesd_kernels.formats import QuantizedLinear

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the CPU kernels cannot run here"
)
SIZES: dict[str, Any] = {
    "hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip
PROMPTS = random_prompts(5, seed=3)
GREEDY = SamplingParams(max_new_tokens=24)


def outputs(target: Any, draft: Any = None, gamma: int = 0, **options: Any) -> list[list[int]]:
    drafter = build_drafter(
        "none" if draft is None else draft, target, options=DraftOptions(**options)
    )
    decoder = SpeculativeDecoder(target, drafter, gamma, max_batch_size=3, max_length=128)
    assert decoder.runner._lean is not None and decoder.runner._lean.whole
    if draft is not None:
        assert drafter.runner._lean is not None and drafter.runner._lean.walks_steps
    return [output.token_ids for output in decoder.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_greedy_outputs_are_the_targets_own(weight_format: str, dtype: torch.dtype) -> None:
    """Target and draft quantised; experts and a tied head among them."""
    target = tiny_model("qwen3_moe", dtype, **SIZES, tie_word_embeddings=True)
    draft = tiny_model("qwen3", dtype, hidden_size=64, head_dim=32, tie_word_embeddings=True)
    draft.config.max_position_embeddings = 128
    quantize(target, weight_format)
    alone = outputs(target)
    assert outputs(target, draft, 3, weight_format=weight_format) == alone
    assert outputs(target, copy.deepcopy(target), 3) == alone  # everything is accepted
    assert type(draft.lm_head) is not QuantizedLinear


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_the_embedded_pair(weight_format: str) -> None:
    target = load_model(target_path())
    weights = {name: p.clone() for name, p in target.named_parameters()}
    alone = outputs(target)
    drafter = {"weight_format": weight_format}
    assert outputs(target, draft_path(), 4, **drafter) == alone
    assert all(torch.equal(p, weights[name]) for name, p in target.named_parameters())
    quantize(target, weight_format)
    assert outputs(target, draft_path(), 4, **drafter) == outputs(target)


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies them, whichever this one is."""
    monkeypatch.setattr(kernels, "multiplies_integers", lambda: True)


def flags(model: Any) -> set[bool]:
    """Whether its quantised layers round their inputs."""
    return {m.int8_activations for m in model.modules() if isinstance(m, QuantizedLinear)}


def model_of(target: Any, draft: Any, rows: int = 3, **options: Any) -> Any:
    """The draft's model as a decoder of ``rows`` sequences runs it."""
    drafter: Any = build_drafter("independent", target, draft, DraftOptions(**options))
    SpeculativeDecoder(target, drafter, 3, max_batch_size=rows, max_length=128)
    return drafter.model


def small(**changes: Any) -> Any:
    return tiny_model("llama", **SIZES | {"intermediate_size": 96} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a draft that is not quantised."""
    small(num_hidden_layers=1).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_drafts_that_are_quantised_here_round_their_activations(
    folder: Path, weight_format: str
) -> None:
    """Read from a folder, or a copy of one that was given, which stays what it was."""
    target, given = small(), small(num_hidden_layers=1)
    for draft in (folder, given):
        assert flags(model_of(target, draft, weight_format=weight_format)) == {True}
    assert flags(given) == flags(target) == set()


def test_where_integers_take_longer_nothing_is_rounded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "multiplies_integers", lambda: False)
    assert flags(model_of(small(), folder, rows=16, weight_format="int4")) == {False}


@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize(
    ("isa", "rows", "anew"),
    [("amx", 8, True), ("amx", 7, False), ("avx512_bf16", 4, True), ("avx512_bf16", 3, False)],
)
def test_larger_batches_are_given_rows_of_int8(
    folder: Path, monkeypatch: pytest.MonkeyPatch, isa: str, rows: int, anew: bool
) -> None:
    """Where a batch fills them; groups are of 32."""
    monkeypatch.setattr(kernels, "cpu_isa", lambda: isa)
    model = model_of(small(), folder, rows, weight_format="int4")
    kinds = {
        (m.weight_format, m.weight_scale.shape[1])
        for m in model.modules()
        if isinstance(m, QuantizedLinear)
    }
    assert kinds == ({("int8", 1)} if anew else {("int4", 2), ("int4", 3), ("int4", 4)})
    assert flags(model) == {not (anew and isa == "amx")}
    target = small()
    assert outputs(target, folder, 3, weight_format="int4") == outputs(target)


@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("again", [2, 16])
def test_a_second_decoder_finds_rows_of_int8_as_they_were(
    folder: Path, monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    """As do rows that were a draft's own: none of them round their activations on tiles."""
    monkeypatch.setattr(kernels, "cpu_isa", lambda: "amx")
    drafter: Any = build_drafter("independent", small(), folder, DraftOptions(weight_format="int8"))
    for rows in (16, again):
        SpeculativeDecoder(small(), drafter, 3, max_batch_size=rows, max_length=128)
        assert flags(drafter.model) == {False}
    quantize(small(num_hidden_layers=1), "int8", group=None).save_pretrained(folder)
    assert flags(model_of(small(), folder, again)) == {False}


@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q6_k"])
def test_a_draft_of_ggufs_blocks_rounds(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf", reason="the file is written with it")
    from support.formats import gguf_file

    no_tokens = lambda writer: writer.add_tokenizer_model("none")
    file = tmp_path / "draft.gguf"
    gguf_file.write_gguf(file, "llama", {"": kind}, metadata=no_tokens, layers=1)
    target = small()
    assert flags(model_of(target, file)) == {True}
    assert outputs(target, file, 3) == outputs(target)


def test_a_draft_that_was_given_is_left_as_it_is(folder: Path) -> None:
    """As is one that is run without our kernels."""
    target, given = small(), quantize(small(num_hidden_layers=1), "int4")
    assert model_of(target, given, rows=8) is given and flags(given) == {False}
    use_int8_activations(given)
    assert model_of(target, given, rows=8) is given and flags(given) == {True}
    assert flags(model_of(target, folder, weight_format="int8", kernels=False)) == {False}


def storages(model: Any) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_a_given_draft_is_not_copied_to_be_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes its matrices' places is all the memory it costs; the given one stays as it was."""
    target = small()
    given = small(num_hidden_layers=1, tie_word_embeddings=True)
    before = {name: (p, p.clone()) for name, p in given.named_parameters()}
    seen: list[set[int]] = []

    def quantized(model: Any, weight_format: str) -> Any:
        seen.append(storages(model))
        return quantize(model, weight_format)

    monkeypatch.setattr(kernels, "quantized", quantized)
    made = model_of(target, given, weight_format="int4")
    assert seen == [storages(given)]
    assert type(made.lm_head) is QuantizedLinear
    assert outputs(target, given, 3, weight_format="int8") == outputs(target)
    assert (
        given.config.tie_word_embeddings
        and given.lm_head.weight is given.get_input_embeddings().weight
    )
    for name, parameter in given.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]), name


@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_rounding_drafts_lose_nobody_anything(folder: Path, weight_format: str) -> None:
    """The target's tokens are its own, as are those of one that is asked to round."""
    for target in (small(), use_int8_activations(quantize(small(), "int4"))):
        alone, before = outputs(target), flags(target)
        assert outputs(target, folder, 3, weight_format=weight_format) == alone
        assert flags(target) == before
        copied = copy.deepcopy(target)
        assert outputs(target, copied, 3) == alone  # everything is accepted


def test_a_draft_that_cannot_be_is_said() -> None:
    target = tiny_model("llama")
    with pytest.raises(UserError, match="must be 'int8' or 'int4', got 'fp8'"):
        build_drafter("auto", target, target, DraftOptions(weight_format="fp8"))
    small = tiny_model("llama", hidden_size=24, intermediate_size=24)
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be int8: .* that 32 divides"):
        build_drafter("auto", target, small, DraftOptions(weight_format="int8"))
