"""The sampler's kernels on a GPU against PyTorch on the CPU, and in a graph.

Written without a GPU at hand; the same kernels run interpreted in ``interpreted/``.
"""

import pytest
import torch

from decoder.model import kernels
from decoder.requests.params import SamplingParams
from decoder.round import Draft
from decoder.sampling import VERIFIERS, Probs, Sampler
from moesd_kernels.experts.triton import unavailable_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"triton: {unavailable_reason()}"),
]
B, G, V = 16, 3, 32064
RULES = ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 100, "top_p": 0.9, "min_p": 0.01})


def sampler_of(device, verifier="standard"):
    sampler = Sampler(B, V, device, verifier)
    for row in range(B):
        temperature = 0.8 if row else 0.0
        params = SamplingParams(temperature=temperature, seed=row, **RULES[row % len(RULES)])
        sampler.admit(row, params, [0], set())
    return sampler


def moved(draft, device):
    return Draft(draft.tokens.to(device), draft.probs.to(device), draft.lengths.to(device))


@pytest.mark.first
def test_keeps_what_pytorch_keeps():
    logits = 3 * torch.randn(B, G + 1, V).to(torch.bfloat16)  # with many ties
    logits[3, 0, 7] = float("nan")
    rows, positions = torch.arange(B), torch.arange(G + 1).expand(B, G + 1)
    expected = sampler_of("cpu").distribution(logits, rows, positions)
    assert kernels.sampling_ops(torch.device("cuda"), torch.bfloat16) is not None
    arguments = [x.cuda() for x in (logits, rows, positions)]
    actual = sampler_of("cuda").distribution(*arguments)
    assert torch.equal(actual.undefined.cpu(), expected.undefined)
    defined = ~expected.undefined
    kept, wanted = actual.probs.cpu()[defined], expected.probs[defined]
    # A cut may fall on either side of a token that is within a rounding of it.
    assert int(((kept > 0) != (wanted > 0)).sum()) <= 2
    torch.testing.assert_close(kept, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.first
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_decides_what_pytorch_decides(verifier):
    target = (2 * torch.randn(B, G + 1, V)).softmax(-1)
    probs = (target[:, :G].log() + 0.5 * torch.randn(B, G, V)).softmax(-1)
    tokens = torch.multinomial(probs.flatten(0, 1), 1).view(B, G)
    draft = Draft(tokens, probs, torch.randint(0, G + 1, (B,)))
    rows, positions = torch.randperm(B), torch.arange(G + 1).expand(B, G + 1)
    expected = sampler_of("cpu", verifier).verify(Probs(target, None), draft, rows, positions)
    on_gpu = (rows.cuda(), positions.cuda())
    actual = sampler_of("cuda", verifier).verify(
        Probs(target.cuda(), None), moved(draft, "cuda"), *on_gpu
    )
    # Another logarithm: a race of V clocks ends otherwise in about 1 of 1,000 draws.
    differs = (actual.tokens.cpu() != expected.tokens).any(1)
    assert int(differs.sum()) <= 1


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_round_in_a_graph(verifier):
    sampler = sampler_of("cuda", verifier)
    logits = torch.randn(B, G + 1, V, device="cuda")
    draft = Draft(
        torch.randint(0, V, (B, G), device="cuda"),
        torch.full((B, G, V), 1 / V, device="cuda"),
        torch.full((B,), G, device="cuda"),
    )
    rows = torch.arange(B, device="cuda")
    positions = torch.arange(G + 1, device="cuda").repeat(B, 1)

    def decide():
        target = sampler.distribution(logits, rows, positions, draft.tokens)
        return sampler.verify(target, draft, rows, positions)

    decide()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decide()
    for _ in range(2):
        logits.normal_()
        positions += 5
        graph.replay()
        expected = decide()
        assert torch.equal(captured.tokens, expected.tokens)
        assert torch.equal(captured.accepted, expected.accepted)
