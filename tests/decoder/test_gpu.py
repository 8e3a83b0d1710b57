"""Decoding and sampling on a GPU against the same on buffers without capture, and on a CPU.

Each test also runs on a CPU; capture, waiting and memory are a GPU's alone. Of those on a GPU, the
five of captured decoding without a draft model's speculation have run (H200).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.eagle_reference import LAYER, H, random_layer, save
from support.tiny import tiny_moe

import moesd_kernels
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import DraftOptions, build_drafter
from decoder.drafters.chain import DraftChain
from decoder.drafters.eagle import EagleDrafter
from decoder.round import Draft, StepState
from decoder.sampling import Probs, Sampler
from decoder.sampling.sampler import VERIFIERS

B, G, V = 6, 3, 1000
GREEDY = SamplingParams(max_new_tokens=12)
SAMPLED = SamplingParams(
    max_new_tokens=12, temperature=0.9, seed=3, top_k=50, top_p=0.95, repetition_penalty=1.2
)
# Two rows, then one, and a refill: few shapes, because each costs a GPU compilations.
PROMPTS = [[7, 90, 11, 13], [8, 80, 15, 19], [9, 70, 21, 25]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def eagle(folder: Path) -> EagleDrafter:
    weights = {"fc.weight": 0.1 * torch.randn(H, 2 * H), **random_layer("layers.0", H, 2)}
    return EagleDrafter(save(folder, LAYER, weights), kernels=True)


DRAFTERS: dict[str, Callable[[str, torch.dtype, Path], Any]] = {
    "none": lambda *_: None,
    "ngram": lambda *_: "ngram",
    "suffix": lambda *_: "suffix",
    "self": lambda *_: "self",
    "independent": lambda device, dtype, _: tiny_moe(seed=1, layers=1, dtype=dtype).to(device),
    "eagle": lambda _, __, folder: eagle(folder),
}


def engine_of(
    name: str, device: str, dtype: torch.dtype, folder: Path, **options: Any
) -> SpeculativeDecoder:
    target = tiny_moe(dtype=dtype).to(device)
    drafter = DRAFTERS[name](device, dtype, folder)
    for model in (target, drafter):
        if isinstance(model, torch.nn.Module):
            # What runs where our kernels do not; the eager experts cannot be captured.
            model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    options = {"max_batch_size": 2, "max_length": 60, "static": True} | options
    told = DraftOptions(kernels=options.get("kernels", True))
    return SpeculativeDecoder(target, build_drafter(drafter, target, options=told), 3, **options)


def tokens_of(engine: SpeculativeDecoder, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(o.token_ids) for o in engine.generate(PROMPTS, params)]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        *((name, GREEDY) for name in DRAFTERS),
        *((name, SAMPLED) for name in ("none", "independent", "eagle")),
    ],
)
def test_captured_decoding_equals_the_same_buffers_uncaptured(device, name, params, tmp_path):
    """Same shapes, so the same bits, in the dtype models come in."""
    if device == "cuda":
        assert moesd_kernels.available_backends()["triton"] is None
    captured = engine_of(name, device, torch.bfloat16, tmp_path)
    plain = engine_of(name, device, torch.bfloat16, tmp_path)
    for runner in (plain.runner, getattr(plain.drafter, "runner", plain.runner)):
        if runner._graphs is not None:
            runner._graphs._calls.capture = False
    expected = tokens_of(plain, params)
    assert len({token for row in expected for token in row}) > 5
    assert tokens_of(captured, params) == expected
    # A draft model has caught up with the first prompts in their first round, and reads others at
    # once: where drafts are drawn, tokens may be others now.
    expected = tokens_of(plain, params)
    assert tokens_of(captured, params) == expected, "now every shape is replayed"


@pytest.mark.parametrize("name", DRAFTERS)
def test_captured_speculation_equals_plain_eager_decoding(device, name, tmp_path):
    """In fp32, where different shapes round too little to matter, on transformers' experts."""
    options = {"kernels": False, "attention": "portable"}
    plain = engine_of("none", device, torch.float32, tmp_path, static=False, **options)
    fast = engine_of(name, device, torch.float32, tmp_path, **options)
    assert tokens_of(fast) == tokens_of(plain)


PARAMS = {
    "temperature": {},
    "top-k": {"top_k": 30},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "logit_bias": {5: 2.0, 9: -3.0},
        "min_new_tokens": 9,
    },
    "everything": {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1},
}


class Round:
    """One round of a sampler on a device: drafts drawn, distributions, and the verdict."""

    def __init__(self, device: str, verifier: str, extra: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(7)
        draft_logits = 3 * torch.randn(B, G + 1, V, generator=generator)
        logits = draft_logits + torch.randn(B, G + 1, V, generator=generator)
        self.sampler = Sampler(B, V, device, verifier)  # type: ignore[arg-type]
        for row in range(B):
            temperature = 0.8 if row < B - 1 else 0.0  # greedy among sampled rows
            params = SamplingParams(temperature=temperature, seed=row, **extra)
            self.sampler.admit(row, params, [3, 5, 5, 9], {11})
        self.logits, self.draft_logits = logits.to(device), draft_logits.to(device)
        self.rows = torch.arange(B, device=device)
        self.positions = 4 + torch.arange(G + 1, device=device).expand(B, -1)
        lengths, history = torch.full_like(self.rows, 3), torch.zeros_like(self.positions)
        self.state = StepState(
            self.rows, lengths, self.rows, self.rows, history, [3] * B, list(range(B))
        )

    def run(self) -> None:
        chain = DraftChain(self.sampler, self.rows, self.state.lengths, G)
        for step in range(G):
            chain.draw(self.draft_logits[:, step : step + 1])
        self.draft: Draft = chain.finish()
        self.target = self.sampler.distribution(
            self.logits, self.rows, self.positions, self.draft.tokens
        )
        self.verdict = self.sampler.verify(self.target, self.draft, self.rows, self.positions)
        self.sampler.commit(
            self.rows, self.verdict.tokens, self.verdict.accepted + 1, self.draft.lengths
        )


@contextmanager
def nothing_waits(device: str) -> Iterator[None]:
    """On a GPU, an operation that waits for it raises."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("name", PARAMS)
def test_a_sampler_decides_as_on_a_cpu_and_waits_for_nothing(device, name, verifier):
    """The noise is the same bits everywhere; no draw of these seeds is within rounding of a tie."""
    here, there = Round(device, verifier, PARAMS[name]), Round("cpu", verifier, PARAMS[name])
    there.run()
    with nothing_waits(device):
        here.run()
    assert not here.target.undefined.any()
    for got, want in ((here.target, there.target), (here.draft, there.draft)):
        assert torch.equal(got.probs.cpu() > 0, want.probs > 0)
        torch.testing.assert_close(got.probs.cpu(), want.probs, rtol=2e-5, atol=1e-9)
    assert torch.equal(here.draft.tokens.cpu(), there.draft.tokens)
    assert torch.equal(here.verdict.tokens.cpu(), there.verdict.tokens)
    assert 0 < int(there.verdict.accepted.sum()) < B * G


def test_coupled_verification_emits_the_targets_own_draws(device):
    round_ = Round(device, "coupled", {"top_p": 0.9})
    round_.run()
    probs, sampler = round_.target.probs, round_.sampler
    for column in range(G + 1):
        alone = Probs(probs[:, column : column + 1], None)
        own = sampler.draw(alone, round_.rows, round_.positions[:, column])
        emitted = column <= round_.verdict.accepted
        assert torch.equal(round_.verdict.tokens[emitted, column], own[emitted])


@pytest.mark.gpu
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_released_decoder_gives_its_memory_back(name, tmp_path):
    target = tiny_moe(dtype=torch.bfloat16).cuda()
    used = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):  # the first also takes what libraries keep
            drafter = DRAFTERS[name]("cuda", torch.bfloat16, tmp_path)
            engine = SpeculativeDecoder(
                target, build_drafter(drafter, target), 3, max_batch_size=2, max_length=60
            )
            tokens_of(engine)
            held = torch.cuda.memory_allocated()
            del engine, drafter
            used.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert used[0] == used[1] == used[2] < held
