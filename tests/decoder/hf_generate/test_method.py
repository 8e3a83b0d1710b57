"""Greedy ``generate(custom_generate=...)`` is ``generate``, token for token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.generation import END, batch, draft, from_threads, left_padded, method, outcome, target
from support.tiny import tiny_moe
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper

from decoder.drafters.ngram import NgramDrafter
from decoder.errors import UserError
from decoder.hf_generate import speculative

torch.set_num_threads(1)
NEW = 12
ENDS = [END, 9, 30, 31, 32]


def even(row: int, ids: Tensor) -> list[int]:
    """Even tokens after odd ones, fewer of them in each further row, or an end."""
    return [END, *range(1 - int(ids[-1]) % 2, 97, 2 + row)]


# Ways to change the target's choice, alone and together with ways to end.
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.7},
    "little repetition": {"repetition_penalty": 0.6},
    "ngrams": {"no_repeat_ngram_size": 2},
    "one of each": {"no_repeat_ngram_size": 1, "repetition_penalty": 1.2},
    "prompt's ngrams": {"encoder_no_repeat_ngram_size": 1},
    "prompt's tokens": {"encoder_repetition_penalty": 2.0, "renormalize_logits": True},
    "bad words": {"bad_words_ids": [[70], [71], [33], [83, 80], [38, 30, 49]]},
    "bias": {"sequence_bias": {(30,): 4.0, (42, 30): -20.0, (49, 42): 6.0}},
    "suppressed": {"suppress_tokens": list(range(20, 50))},
    "begin": {"begin_suppress_tokens": list(range(30, 97))},
    "allowed": {"prefix_allowed_tokens_fn": even},
    "watermark": {"watermarking_config": {"bias": 3.0, "context_width": 1}},
    "all at once": {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[70]],
        "sequence_bias": {(30,): 4.0}, "suppress_tokens": [71, 72], "forced_eos_token_id": 7,
        "prefix_allowed_tokens_fn": even, "remove_invalid_values": True,
    },
    "warpers": {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.3)])},
}  # fmt: skip
ENDINGS: dict[str, dict[str, Any]] = {
    "length": {"max_new_tokens": NEW, "eos_token_id": None},
    "eos": {"max_new_tokens": NEW, "eos_token_id": ENDS},
    "least": {"max_new_tokens": NEW, "eos_token_id": ENDS, "min_new_tokens": 5},
    "decay": {
        "max_length": 20, "eos_token_id": END, "exponential_decay_length_penalty": (1, 1.6)
    },
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_greedy_output_is_that_of_generate(family: str, change: str) -> None:
    drafters = ["ngram", "draft model"] + ["self"] * (family == "mixtral")
    turn = list(CHANGES).index(change)
    # Each family meets every change with two endings at least, the larger with all of them.
    endings = list(ENDINGS) if family == "mixtral" else [list(ENDINGS)[turn % 4], "eos"]
    for ending in endings:
        asked = {**batch(), "do_sample": False, **CHANGES[change], **ENDINGS[ending]}
        expected = target(family).generate(**asked)
        turn += 1
        for drafter in drafters if ending == "eos" else [drafters[turn % len(drafters)]]:
            ours = target(family).generate(custom_generate=method(family, drafter), **asked)
            assert torch.equal(ours, expected), (ending, drafter)


def same(asked: dict[str, Any], family: str = "llama", drafter: str = "ngram") -> Tensor:
    """What both return."""
    theirs = outcome(target(family), asked)
    ours = outcome(target(family), asked | {"custom_generate": method(family, drafter)})
    assert isinstance(theirs, Tensor) and isinstance(ours, Tensor), (theirs, ours)
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    return ours


GIVEN: dict[str, dict[str, Any]] = {
    "no mask, and padding to be found": {"input_ids": batch()["input_ids"]},
    "one token": left_padded([[11], [12]]),
    "one token and a forced one": {**left_padded([[11], [12]]), "forced_bos_token_id": 40},
    "an end in the prompt": left_padded([[END, 11, END], [12, END]]),
    "one row": {"input_ids": batch()["input_ids"][:1]},
    "a list of masks as booleans": {**batch(), "attention_mask": batch()["attention_mask"].bool()},
    "32 bits": {**batch(), "input_ids": batch()["input_ids"].int()},
    "no prompt": {"bos_token_id": 11},
    "no new limit": {**batch(), "max_new_tokens": None},
    "the whole length": {**batch(), "max_new_tokens": None, "max_length": 11},
    "one new token": {**batch(), "max_new_tokens": 1},
    "an end nobody has": {**batch(), "eos_token_id": [-1, 4000]},
    "a padding of its own": {**batch(), "pad_token_id": 90, "eos_token_id": ENDS},
    "padding that is an end": {**batch(), "pad_token_id": END, "eos_token_id": ENDS},
    "sampled from one": {**batch(), "do_sample": True, "top_p": 0.0},
    "hardly warm": {**batch(), "do_sample": True, "temperature": 1e-30},
    "penalised beyond": {**batch(), "repetition_penalty": 1e12},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", GIVEN)
def test_prompts_and_lengths_of_any_form(case: str) -> None:
    asked = {"max_new_tokens": 8, "do_sample": False, **GIVEN[case]}
    same({name: value for name, value in asked.items() if value is not None})


def test_the_models_own_generation_config_counts() -> None:
    model = copy.deepcopy(target("llama"))
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, suppress_tokens=[70, 71], max_new_tokens=7, pad_token_id=0
    )
    ours = model.generate(**batch(), custom_generate=speculative("ngram", 2, kernels=False))
    assert torch.equal(ours, model.generate(**batch()))


def test_nothing_to_generate_is_refused_by_transformers() -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        target("llama").generate(
            **batch(), max_new_tokens=0, custom_generate=method("llama", "ngram")
        )


def test_a_row_that_meets_the_end_of_the_context_is_refused_and_others_are_not() -> None:
    # Rotary positions go on for transformers; the decoder's cache does not.
    limited = speculative("ngram", 2, kernels=False, max_length=20)
    model = target("llama")
    with pytest.raises(UserError, match=r"max_length of 20 after \d+ of 300 new tokens"):
        model.generate(**batch(), eos_token_id=None, max_new_tokens=300, custom_generate=limited)
    asked = {**batch(), "eos_token_id": list(range(60, 97)), "max_new_tokens": 300}
    assert torch.equal(model.generate(custom_generate=limited, **asked), model.generate(**asked))


@pytest.mark.parametrize("drafter", ["ngram", NgramDrafter(4, 2), "draft model"])
def test_one_decoder_serves_batches_up_to_its_own(drafter: Any) -> None:
    model = target("mixtral")
    ours = speculative(draft("mixtral") if drafter == "draft model" else drafter, 2, kernels=False)
    kept = []
    for count in (2, 4, 3, 1):
        asked = {**batch(count), "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(custom_generate=ours, **asked), model.generate(**asked))
        kept.append(ours._decoder)
    assert kept[1] is kept[2] is kept[3]


def test_another_model_gets_a_decoder_of_its_own() -> None:
    ours = speculative("ngram", 2, kernels=False)
    for seed in (0, 1, 2):  # each is gone before the next one comes, perhaps to its address
        model = tiny_moe(seed)
        asked = {**batch(2), "max_new_tokens": 6, "do_sample": False}
        expected = model.generate(**asked)
        assert torch.equal(model.generate(custom_generate=ours, **asked), expected)


def test_a_failure_leaves_the_model_and_the_method_as_they_were() -> None:
    model, ours = target("llama"), method("llama", "ngram")
    before = copy.deepcopy(model.generation_config.to_dict()), model.config._attn_implementation

    def failing(row: int, ids: Tensor) -> list[int]:
        if len(ids) > 12:
            raise KeyError("no such prefix")
        return list(range(97))

    for _ in range(2):
        with pytest.raises(Exception, match="no such prefix"):
            model.generate(
                **batch(), max_new_tokens=9, prefix_allowed_tokens_fn=failing, custom_generate=ours
            )
        same({**batch(), "max_new_tokens": 9, "do_sample": False})
    assert before == (model.generation_config.to_dict(), model.config._attn_implementation)
    assert not model.training


@pytest.mark.parametrize("drafter", ["ngram", "self"])
def test_our_kernels_serve_as_well(drafter: str) -> None:
    model = tiny_moe(dtype=torch.float32)
    asked = {
        **batch(), "max_new_tokens": 10, "do_sample": False, "no_repeat_ngram_size": 2,
        "suppress_tokens": [70, 71], "max_time": 1e6,
    }  # fmt: skip
    expected = model.generate(**asked)
    assert torch.equal(model.generate(custom_generate=speculative(drafter, 3), **asked), expected)


def test_a_model_in_training_stays_in_it() -> None:
    model = copy.deepcopy(target("llama")).train()
    asked = {**batch(), "max_new_tokens": 6, "do_sample": False}
    ours = model.generate(custom_generate=speculative("ngram", 2, kernels=False), **asked)
    assert torch.equal(ours, model.generate(**asked))
    assert all(module.training for module in model.modules())


def test_threads_get_their_own_outputs_or_an_error() -> None:
    """Of one method there is one decoder; a call is refused while another has not ended."""
    model, ids = tiny_moe(), torch.tensor([[5, 6, 7], [1, 2, 3]])
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, **options).tolist()
    own = speculative("ngram", 2)
    call = lambda: model.generate(ids, custom_generate=own, **options).tolist()
    results = from_threads(call)
    refused = [result for result in results if result != expected]
    assert expected in results
    assert set(refused) <= {"expected a method that is not generating, got one that is"}
    assert call() == expected
