"""L1': negative controls that statistics are blind to, caught by what holds of every draw."""

import pytest
import torch
from support.toy_markov import World, half_mixed_draft, random_chain, sampler_of

from decoder.round import Draft
from decoder.sampling import Sampler
from decoder.sampling.accept import accept_standard, drafted_probs
from decoder.sampling.verdict import leading, residual

TARGET = random_chain(1)
DRAFT = half_mixed_draft(TARGET, 2)


# 7. Boundary values of the uniforms, and residuals without mass.


def test_a_zero_uniform_cannot_accept_an_impossible_token():
    target = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    draft = Draft(torch.tensor([[0]]), torch.tensor([[[0.5, 0.5]]]), torch.tensor([1]))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert accept_standard(target, draft, zero).item() == 0
    target_x, draft_x = drafted_probs(target, draft)
    mutant = leading(zero * draft_x <= target_x, draft.lengths)  # not strict
    assert mutant.item() == 1


def test_equal_distributions_leave_a_usable_residual():
    probs = torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]])
    draft = Draft(torch.tensor([[1]]), probs[:, :1], torch.tensor([1]))
    left = residual(probs, draft, torch.tensor([0]))
    assert torch.equal(left, probs[:, 0])
    mutant = (probs[:, 0] - draft.probs[:, 0]).clamp(min=0)
    assert mutant.argmax().item() == 0 and probs[0, 0, 0] == 0  # would emit an impossible token


# 8. Randomness that depends on the batch.


class NoiseByRow(Sampler):
    """Keys noise by the row of the batch in place of the request's seed."""

    def verify(self, target, draft, rows, positions):
        seeds = self._table.seeds
        self._table.seeds = seeds.clone()
        self._table.seeds[rows] = torch.arange(len(rows))
        verdict = super().verify(target, draft, rows, positions)
        self._table.seeds = seeds
        return verdict


def permuted_outputs_agree(kind: type[Sampler], verifier: str) -> bool:
    """Whether 500 requests give the same tokens in another batch order with 100 others between."""
    plain = sampler_of(500, verifier, kind=kind)
    mixed = sampler_of(600, verifier, kind=kind)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(3))
    mixed._table.seeds[:600] = order
    expected = World(plain, TARGET, DRAFT).generate(8)
    got = World(mixed, TARGET, DRAFT).generate(8)
    where = order.argsort()[:500]
    return torch.equal(got[where], expected)


@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
def test_output_does_not_depend_on_batch_mates(verifier):
    assert permuted_outputs_agree(Sampler, verifier)
    assert not permuted_outputs_agree(NoiseByRow, verifier)
