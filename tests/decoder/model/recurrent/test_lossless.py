"""Hybrids decode to transformers' own tokens, whatever drafts for them and shares their batch."""

from __future__ import annotations

import copy
import functools
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.decoding import decoder, poison_states
from support.families import build
from support.tiny import perturbed, random_prompts, randomize

from bench.workloads.scaling import random_eagle
from decoder import SamplingParams
from decoder.audit import audit, logit_jitter
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.drafters.ngram import NgramDrafter
from decoder.drafters.replay import ReplayDrafter
from decoder.drafters.self_draft import SelfDrafter
from decoder.gamma.base import FixedGamma
from decoder.hf_generate import speculative
from decoder.model.runner import ModelRunner
from decoder.round import Draft, StepState

NEW_TOKENS = 9
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS)
PROMPTS = random_prompts(9, seed=3, high=7)
FAMILIES = [  # one of each kind of layer and placing of it
    "Qwen3NextForCausalLM", "OlmoHybridForCausalLM", "KimiLinearForCausalLM", "Lfm2MoeForCausalLM",
    "BambaForCausalLM", "FalconH1ForCausalLM", "NemotronHForCausalLM", "JambaForCausalLM",
    "ZambaForCausalLM", "Mamba2ForCausalLM",
]  # fmt: skip


@functools.cache
def model_of() -> Any:
    """A Qwen3-Next whose states lie on both sides of attention.

    Its gates have a vector's width or more: torch computes what is left of one by other code.
    """
    config = transformers.Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_value_heads=32,
        linear_num_key_heads=16, linear_key_head_dim=8, linear_value_head_dim=8,
        max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(config)
    randomize(model, 0)
    return model.eval()


@functools.cache
def own() -> list[list[int]]:
    """What transformers' ``generate`` makes of each prompt."""
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS}
        whole = model_of().generate(ids, **asked, do_sample=False)[0]
        outputs.append(whole[len(prompt) :].tolist())
    return outputs


def recorded(outputs: list[list[int]]) -> ReplayDrafter:
    """Drafts that are right seven times in ten."""
    pairs = zip(PROMPTS, outputs, strict=True)
    return ReplayDrafter(0.7, recordings={tuple(prompt): output for prompt, output in pairs})


def drafter_of(kind: str) -> Any:
    if kind == "independent":
        return IndependentDrafter(perturbed(model_of()))
    if kind == "eagle":
        return EagleDrafter(random_eagle(model_of()))
    return {"ngram": NgramDrafter, "self": SelfDrafter}[kind]()


def tokens_of(made: Any) -> list[list[int]]:
    return [output.token_ids for output in made.generate(PROMPTS, PARAMS)]


EVERY = [*product(["ngram", "independent", "self"], range(1, 9)), ("eagle", 4)]


@pytest.mark.parametrize(("kind", "batch"), EVERY)
def test_a_hybrid_decodes_to_its_own_tokens(kind: str, batch: int) -> None:
    """Rows are used again, but for the last batch sizes; every draft length has its turn."""
    made = decoder(model_of(), drafter_of(kind), batch % 7, max_batch_size=batch)
    assert tokens_of(made) == own()


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_outputs_are_those_of_plain_decoding(name: str) -> None:
    model = build(name, torch.bfloat16)
    options = {"kernels": True, "attention": "auto", "max_batch_size": 3}
    plain = tokens_of(decoder(model, None, 0, **options))
    made = decoder(model, recorded(plain), 4, **options)
    assert tokens_of(made) == plain
    assert made.stats.alpha > 0.3
    texts = [prompt + output for prompt, output in zip(PROMPTS, plain, strict=True)]
    longest = sorted(texts, key=len)[-3:]
    assert logit_jitter(made.runner, longest, [len(text) - 5 for text in longest], 5) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_verify_equals_single_steps_bit_for_bit(dtype: torch.dtype) -> None:
    made = decoder(copy.deepcopy(model_of()).to(dtype), None, 6, kernels=True, attention="auto")
    texts = random_prompts(4, seed=5, low=8, high=20)
    assert logit_jitter(made.runner, texts, [1, 5, 3, 4][: len(texts)], 4) == 0.0


class Changing(FixedGamma):
    """Another draft length in each round."""

    gammas = (3, 0, 0, 1, 6, 0, 5)

    def choose(self, live_batch: int, context: int) -> int:
        self.rounds = getattr(self, "rounds", -1) + 1
        return self.gammas[self.rounds % len(self.gammas)]


class Audited:
    """Wraps a drafter: before each round, checks the target's states and poisons what is stale.

    Each must be what a prefill of as many of its row's tokens leaves.
    """

    hidden_layers = None

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.name, self.audits = drafter, drafter.name, 0
        self.fresh = ModelRunner(model_of(), 1, 64)

    def bind(self, runner: Any, sampler: Any, max_gamma: int) -> None:
        self.states = runner.cache.recurrent
        self.drafter.bind(runner, sampler, max_gamma)

    def admit(self, *args: Any) -> None:
        self.drafter.admit(*args)

    def propose(self, state: StepState, gamma: int) -> Draft:
        for row, _ in state.rows_and_lengths():
            for place, layer in self.states.layers.items():
                (ours,) = layer.recurrences
                taken = ours.progress[0, row, None]
                self.fresh.prefill(torch.tensor([0]), state.tokens[row, None, :taken], taken)
                (fresh,) = self.fresh.cache.recurrent.layers[place].recurrences
                torch.testing.assert_close(ours.states[row], fresh.states[0])
                self.audits += 1
        poison_states(self.states, dict(state.rows_and_lengths()))
        return self.drafter.propose(state, gamma)

    def commit(self, *args: Any) -> None:
        self.drafter.commit(*args)

    def release(self, rows: Any) -> None:
        self.drafter.release(rows)


@pytest.mark.parametrize("kind", ["self", "independent"])
def test_states_are_those_of_their_tokens_whatever_lies_beside_them(kind: str) -> None:
    """Rows are used again, and draft lengths change from round to round."""
    audited = Audited(drafter_of(kind))
    made = decoder(model_of(), audited, Changing(6), max_batch_size=4)
    assert tokens_of(made) == own()
    assert audited.audits > 20


def test_a_hybrid_that_drafts_for_itself_is_always_right() -> None:
    """As an independent model, whatever it has missed: rounds without drafts, and prompts."""
    made = decoder(model_of(), IndependentDrafter(model_of()), Changing(6), max_batch_size=2)
    assert tokens_of(made) == own()
    assert made.stats.alpha == 1.0


@pytest.mark.parametrize("kind", ["self", "independent"])
def test_what_fails_in_the_middle_of_a_forward_is_tried_again(kind: str) -> None:
    """Layers before it have moved on, those behind it have not."""
    drafter = drafter_of(kind)
    made = decoder(model_of(), drafter, Changing(6), max_batch_size=3)
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise RuntimeError("expected to be tried again")
        return operators.gated_delta_rule(*args)

    for runner in {made.runner, getattr(drafter, "runner", made.runner)}:
        states = runner.cache.recurrent
        operators = states.operators
        convolution = operators.short_convolution
        states.operators = SimpleNamespace(gated_delta_rule=failing, short_convolution=convolution)
    assert tokens_of(made) == own()
    assert calls > 80


def test_generate_and_the_audit_take_hybrids() -> None:
    prompts = [prompt for prompt in PROMPTS if len(prompt) == len(PROMPTS[0])]
    ids = torch.tensor(prompts)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS}
    expected = model_of().generate(ids, **asked, do_sample=False)
    method = speculative("ngram", 3, kernels=False)
    got = model_of().generate(ids, **asked, do_sample=False, custom_generate=method)
    assert torch.equal(got, expected)
    plain, made = decoder(model_of(), None, 0), decoder(model_of(), recorded(own()), 4)
    found = audit(plain, made, PROMPTS, PARAMS, model_of)
    assert found.identical == found.exact == len(PROMPTS)
