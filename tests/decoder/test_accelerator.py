"""What holds on an accelerator, on tensors without data: anything that looks at one fails here.

A ``meta`` tensor stands for one on a device: to wait for its value is impossible, not just slow.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.decoding import decoder
from support.eagle_reference import LAYER, H, random_layer, save
from support.tiny import MOE_VOCAB, tiny_moe
from torch import Tensor

from decoder import SamplingParams
from decoder.drafters.chain import DraftChain
from decoder.drafters.eagle import EagleDrafter
from decoder.model.attention import Placement, additive, reference_attention, register
from decoder.model.runner import ModelRunner
from decoder.round import StepState
from decoder.sampling import Sampler
from decoder.sampling.sampler import VERIFIERS

META, BF16 = torch.device("meta"), torch.bfloat16
ROWS, LENGTH = 2, 45


def meta_runner(
    monkeypatch: pytest.MonkeyPatch, static: bool = False, experts: str = "grouped_mm"
) -> Any:
    """A runner of a model without data; the probe, which compares values, is left out."""
    monkeypatch.setattr(ModelRunner, "_probe", lambda self: True)
    register()
    model = tiny_moe(dtype=BF16)
    model.set_experts_implementation(experts)
    return ModelRunner(model.to(META), ROWS, LENGTH + 10, static=static)


@pytest.fixture
def sdpa(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, bool]]:
    """Keys, masks and whether cuDNN was allowed, of each call of SDPA."""
    calls: list[tuple[Tensor, Tensor, bool]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        calls.append((keys, options["attn_mask"], torch.backends.cuda.cudnn_sdp_enabled()))
        return original(query, keys, values, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return calls


def check_masks(calls: list[tuple[Tensor, Tensor, bool]], layers: int) -> None:
    assert len(calls) == layers
    assert len({id(mask) for _, mask, _ in calls}) == 1, "one mask for all layers"
    for keys, mask, cudnn in calls:
        assert mask.dtype == BF16 and not cudnn
        assert mask.shape[-1] == keys.shape[2] and mask.shape[-1] % 64 == 0
        assert mask.stride(-1) == 1 and mask.stride(-2) % 64 == 0
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("static", [False, True])
def test_a_forward_waits_for_nothing_and_makes_one_aligned_mask(monkeypatch, sdpa, static, experts):
    runner = meta_runner(monkeypatch, static, experts)
    tokens = torch.zeros(ROWS, 3, dtype=torch.int64, device=META)
    out = runner.forward(
        tokens,
        torch.zeros(ROWS, dtype=torch.int64, device=META),
        tokens,
        hidden_layers=(0, 2),
        logits_positions=tokens[:, :1],
        max_position=LENGTH,
    )
    assert out.logits.shape == (ROWS, 1, MOE_VOCAB) and out.logits.device == META
    check_masks(sdpa, layers=2)


def meta_state() -> StepState:
    rows = torch.zeros(ROWS, dtype=torch.int64, device=META)
    history = torch.zeros(ROWS, LENGTH + 10, dtype=torch.int64, device=META)
    return StepState(rows, rows, rows, rows, history, [LENGTH - 2, LENGTH], [0, 1])


def test_an_eagle_round_waits_for_nothing(monkeypatch, sdpa, tmp_path):
    runner = meta_runner(monkeypatch)
    weights = {"fc.weight": torch.randn(H, 2 * H), **random_layer("layers.0", H, 2)}
    drafter = EagleDrafter(save(tmp_path, LAYER, weights))
    sampler = Sampler(ROWS, MOE_VOCAB, META)
    drafter.bind(runner, sampler, 3)
    drafter._host_synced = [LENGTH - 3, LENGTH - 2]
    draft = drafter.propose(meta_state(), 3)
    assert draft.tokens.shape == (ROWS, 3)
    check_masks(sdpa[:1], layers=1)
    assert all(mask.shape[-1] % 64 == 0 for _, mask, _ in sdpa)
    verdict = SimpleNamespace(tokens=torch.zeros(ROWS, 4, dtype=torch.int64, device=META))
    hidden = torch.zeros(ROWS, 4, H, dtype=BF16, device=META)
    drafter.commit(meta_state(), verdict, hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, 3])
def test_an_additive_mask_means_what_the_bool_one_does(window):
    q = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 64, 2, 8, dtype=torch.float64).unbind(0)
    placement = Placement(None, torch.tensor([[4, 5, 6], [0, 1, -1]]), 64)
    visible = placement.visible(window, 2)
    assert placement.sdpa_mask(window, 2, q.dtype) is visible, "a CPU keeps the bool mask"
    packed = q.unflatten(2, (-1, 2)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = torch.nn.functional.scaled_dot_product_attention(
        packed,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=additive(visible, q.dtype),
        scale=0.3,
    )
    out = out.unflatten(2, (2, 3)).permute(0, 3, 1, 2, 4).reshape(2, 3, 4, 8)
    expected = reference_attention(q, keys, values, placement.visible(window), 0.3, None, None)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("new_tokens", [1, 8])
def test_logits_without_a_distribution_end_the_request(monkeypatch, new_tokens):
    """They are noted on the device and read with the round's report."""
    engine = decoder(tiny_moe(), None, 0, max_length=40)
    monkeypatch.setattr(engine.sampler, "device", META)
    params = SamplingParams(temperature=1.0, max_new_tokens=new_tokens)
    assert len(engine.generate([[7, 8]], params)) == 1
    engine.runner.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="2 of 2 requests failed: prompt 0: logits must"):
        engine.generate([[7, 8], [9]], params)


MIXED = (
    SamplingParams(temperature=0.8, top_p=0.9, seed=1),
    SamplingParams(temperature=1.0, top_k=20, min_p=0.1, repetition_penalty=1.2, seed=2),
    SamplingParams(logit_bias={3: 1.0}, presence_penalty=0.5, min_new_tokens=3),
)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_sampler_waits_for_nothing_and_sends_nothing(monkeypatch, verifier):
    B, G = len(MIXED), 2
    sampler = Sampler(B, MOE_VOCAB, META, verifier)
    for row, params in enumerate(MIXED):
        sampler.admit(row, params, [3, 5], {7})
    rows = torch.zeros(B, dtype=torch.int64, device=META)
    positions = torch.zeros(B, G + 1, dtype=torch.int64, device=META)
    logits = torch.zeros(B, G + 1, MOE_VOCAB, dtype=BF16, device=META)
    # From the host to the device is a wait, too, where the memory is not pinned.
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("sent to the device"))
    chain = DraftChain(sampler, rows, rows, G)
    for step in range(G):
        chain.draw(logits[:, step : step + 1])
    draft = chain.finish()
    assert draft.probs is not None and draft.probs.shape == (B, G, MOE_VOCAB)
    target = sampler.distribution(logits, rows, positions, draft.tokens)
    verdict = sampler.verify(target, draft, rows, positions)
    sampler.commit(rows, verdict.tokens, verdict.accepted + 1)
    assert verdict.tokens.shape == (B, G + 1) and verdict.tokens.device == META
