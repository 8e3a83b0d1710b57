"""The context is the model's whatever is drafted: to its last position, and none beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoding import decoder
from support.eagle_reference import LAYER, H, random_layer, save
from support.tiny import greedy_reference, perturbed, random_prompts, tiny_model, tiny_moe

from decoder import SamplingParams
from decoder.drafters import HybridDrafter
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.errors import UserError

torch.set_num_threads(1)

CONTEXT = 48
LENGTHS = (3, 36, 42, CONTEXT - 1)  # of prompts decoded together, each to the last position
PARAMS = SamplingParams(max_new_tokens=1000, ignore_eos=True)
F64 = torch.float64


def model_of(family: str, context: int = CONTEXT, **changes: Any) -> Any:
    return tiny_model(family, F64, max_position_embeddings=context, **changes)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_prompts(1, seed=n, low=n, high=n)[0] for n in LENGTHS]


@pytest.fixture(scope="module", params=["llama", "opt"])  # computed positions, and a table of them
def target(request: Any) -> Any:
    return model_of(request.param)


@pytest.fixture(scope="module")
def expected(target: Any, prompts: list[list[int]]) -> list[list[int]]:
    found = [o.token_ids for o in decoder(target).generate(prompts, PARAMS)]
    assert [len(tokens) for tokens in found] == [CONTEXT - n for n in LENGTHS]
    assert found[1] == greedy_reference(target, prompts[1], CONTEXT - LENGTHS[1])
    return found


@pytest.mark.parametrize("room", [2, 3, 4])
@pytest.mark.parametrize("drafter", ["ngram", "draft"])
def test_rows_shorter_than_those_of_the_trial(drafter, room):
    """On the kernels, whose angles are a table of the row's positions."""
    model = tiny_model("qwen3_moe", torch.float32, hidden_size=64, head_dim=32)
    make = {"ngram": lambda: "ngram", "draft": lambda: perturbed(model, 3, 0.05)}
    engine = decoder(model, make[drafter](), 2, max_length=room, kernels=True, attention="auto")
    assert engine.runner._lean is not None
    (output,) = engine.generate([[5]], PARAMS)
    assert output.token_ids == greedy_reference(model, [5], room - 1, eos=False)


@pytest.mark.parametrize("gamma", [3, 300])
@pytest.mark.parametrize("drafter", ["ngram", "draft", "short draft", "short table", "hybrid"])
def test_every_position_is_used_whatever_drafts(target, expected, prompts, drafter, gamma):
    make = {
        "ngram": lambda: "ngram",
        "draft": lambda: perturbed(target, 3, 0.05),
        "short draft": lambda: model_of("llama", 40),
        "short table": lambda: model_of("opt", 40),
        "hybrid": lambda: HybridDrafter(IndependentDrafter(model_of("llama", 40)), threshold=2),
    }
    engine = decoder(target, make[drafter](), gamma)
    assert engine.max_length == CONTEXT
    outputs = engine.generate(prompts, PARAMS)
    assert [o.token_ids for o in outputs] == expected
    assert engine.stats.drafted > 0
    # A row that has outgrown its draft model, and one whose last token is its first.
    assert outputs[2].stats.drafted == 0 or "short" not in drafter
    assert outputs[3].stats.rounds == 0


@pytest.mark.parametrize("gamma", [4, 300])
@pytest.mark.parametrize("own", [30, 512])
def test_heads_and_self_drafts_end_there_too(tmp_path: Path, gamma: int, own: int) -> None:
    target = tiny_model("qwen3_moe", torch.float32, max_position_embeddings=CONTEXT)
    prompts = [random_prompts(1, seed=n, low=n, high=n)[0] for n in LENGTHS]
    plain = [o.token_ids for o in decoder(target).generate(prompts, PARAMS)]
    weights = {"fc.weight": torch.randn(H, 2 * H), **random_layer("layers.0", H, 2)}
    config = {**LAYER, "max_position_embeddings": own}
    for drafter in (EagleDrafter(save(tmp_path, config, weights)), "self"):
        engine = decoder(target, drafter, gamma)
        outputs = engine.generate(prompts, PARAMS)
        assert [o.token_ids for o in outputs] == plain
        assert outputs[0].stats.drafted > 0
        assert (outputs[1].stats.drafted == 0) == (own == 30 and drafter != "self")


def test_a_row_is_as_long_as_the_context_and_no_longer() -> None:
    target = tiny_moe()
    for gamma in (0, 8, 300):
        engine = decoder(target, "ngram", gamma)
        assert engine.max_length == 256
        (output,) = engine.generate([[7] * 250], PARAMS)
        assert len(output.token_ids) == 6
        with pytest.raises(UserError, match="256 tokens leave no room in a context of 256"):
            engine.generate([[7] * 256])
    with pytest.raises(
        UserError, match=r"max_length must be in \[2, 256\] for this model, got 257"
    ):
        decoder(target, max_length=257)


@pytest.mark.parametrize("answer", [-3, 10**9])
def test_a_controller_may_ask_for_anything(target, expected, prompts, answer):
    class Asking:
        def choose(self, live_batch: int, context: int) -> int:
            return answer

        def observe(self, *args: Any) -> None: ...

        def admitted(self, *args: Any) -> None: ...

    outputs = decoder(target, "ngram", Asking()).generate(prompts, PARAMS)
    assert [o.token_ids for o in outputs] == expected
