"""L0: the law of a round by exact enumeration in fp64, from the shipped functions themselves.

Acceptance probabilities are read off the shipped rules by bracketing: a rule takes uniforms, so its
probability is the number below which it accepts and above which it does not.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from decoder.round import Draft
from decoder.sampling.accept import accept_standard
from decoder.sampling.block import accept_block
from decoder.sampling.coupled import race, verify_coupled
from decoder.sampling.verdict import residual

V, G = 4, 3
EXACT = 1e-12
NUDGE = 1e-13
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=G)))  # [V**G, G]


def random_law(seed: int, zeros: bool = False) -> list[Tensor]:
    """Conditional distributions after every context of up to G tokens: ``[V**i, V]`` for i ≤ G."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for i in range(G + 1):
        law = torch.rand(V**i, V, generator=generator, dtype=torch.float64) ** 2
        if zeros:
            law[torch.rand(law.shape, generator=generator) < 0.3] = 0.0
            law[:, 1] += 0.05
        levels.append(law / law.sum(-1, keepdim=True))
    return levels


def along(law: list[Tensor], tokens: Tensor, count: int) -> Tensor:
    """Distributions ``[N, count, V]`` at the first ``count`` positions of ``tokens`` ``[N, G]``."""
    index = torch.zeros(len(tokens), dtype=torch.int64)
    rows = []
    for i in range(count):
        rows.append(law[i][index])
        if i < tokens.shape[1]:
            index = index * V + tokens[:, i]
    return torch.stack(rows, dim=1)


def drafts(draft_law: list[Tensor], one_hot: bool, lengths: Tensor) -> tuple[Draft, Tensor]:
    """Every draft sequence and its probability ``[V**G]``."""
    dense = along(draft_law, SEQUENCES, G)
    if one_hot:
        chosen = dense.argmax(dim=-1)
        draft = Draft(SEQUENCES, None, lengths)
        return draft, (chosen == SEQUENCES).all(dim=1).double()
    weight = dense.gather(-1, SEQUENCES[..., None])[..., 0].prod(dim=1)
    return Draft(SEQUENCES, dense, lengths), weight


def standard_pass_rates(target: Tensor, draft: Draft) -> Tensor:
    """P(test i passes | tests before passed) ``[N, G]``, bracketed on the shipped rule."""
    tokens = draft.tokens[..., None]
    target_x = target[:, :G].gather(-1, tokens)[..., 0]
    draft_x = torch.ones_like(target_x)
    if draft.probs is not None:
        draft_x = draft.probs.gather(-1, tokens)[..., 0]
    rates = torch.where(draft_x > 0, target_x / draft_x, 0.0).clamp(max=1.0)
    for i in range(G):
        reach = draft.lengths > i
        for factor, passes in ((1 - NUDGE, rates[:, i] > 0), (1 + NUDGE, rates[:, i] == 1)):
            uniforms = torch.full_like(rates, 0.0)
            uniforms[:, i] = (rates[:, i] * factor).clamp(max=1 - NUDGE, min=1e-300)
            # Tests before i must pass whatever their rate: give them certain tokens.
            certain = target.clone()
            certain[:, :i] = 1.0
            got = accept_standard(certain, draft, uniforms) > i
            sure = draft_x[:, : i + 1].gt(0).all(dim=1) & reach
            assert torch.equal(got[sure], passes[sure])
    return rates


def block_pass_rates(target: Tensor, draft: Draft) -> Tensor:
    """P(u_i ≤ h_i) from the published recursion in plain fp64, bracketed on the shipped rule."""
    N = len(target)
    rates = torch.zeros(N, G, dtype=torch.float64)
    for n in range(N):
        w, length = 1.0, int(draft.lengths[n])
        for i in range(1, length + 1):
            x = draft.tokens[n, i - 1]
            q_x = 1.0 if draft.probs is None else draft.probs[n, i - 1, x].item()
            w = min(w * target[n, i - 1, x].item() / q_x, 1.0) if q_x > 0 else 0.0
            if i == length:
                rates[n, i - 1] = w
                continue
            q_next = torch.zeros(V, dtype=torch.float64)
            if draft.probs is None:
                q_next[draft.tokens[n, i]] = 1.0
            else:
                q_next = draft.probs[n, i]
            m = (w * target[n, i] - q_next).clamp(min=0).sum().item()
            rates[n, i - 1] = m / (m + 1 - w) if m + 1 - w > 0 else 1.0
    for i in range(G):
        alone = torch.full_like(rates, 2.0)
        # 1e-11: near h = 0 and h = 1 the shipped sum may differ in the last bits.
        alone[:, i] = (rates[:, i] - 1e-11).clamp(min=1e-300)
        passes = (rates[:, i] > 1e-11) & (draft.lengths > i)
        assert torch.equal(accept_block(target, draft, alone)[0] == i + 1, passes)
        alone[:, i] = rates[:, i] + 1e-11
        assert not (accept_block(target, draft, alone)[0] == i + 1).any()
    return rates


def emitted_law(
    target_law: list[Tensor], target: Tensor, draft: Draft, count_law: Tensor, residuals: Tensor
) -> Tensor:
    """Law of the first G + 1 tokens ``[V] * (G + 1)`` when the target continues after a round.

    Args:
        count_law: ``[N, G + 1]``, P(k accepted and this draft).
        residuals: ``[N, G + 1, V]``, the law of the next token given k, normalised.
    """
    law = torch.zeros((V,) * (G + 1), dtype=torch.float64)
    everything = list(itertools.product(range(V), repeat=G + 1))
    whole = torch.tensor(everything)
    conditional = along(target_law, whole[:, :G], G + 1).gather(-1, whole[..., None])[..., 0]
    for n in range(len(draft.tokens)):
        for k in range(G + 1):
            if count_law[n, k] == 0:
                continue
            match = (whole[:, :k] == draft.tokens[n, :k]).all(dim=1)
            rest = conditional[:, k + 1 :].prod(dim=1)
            chance = count_law[n, k] * residuals[n, k][whole[:, k]] * rest
            law += torch.where(match, chance, 0.0).view(law.shape)
    return law


def target_joint(target_law: list[Tensor]) -> Tensor:
    whole = torch.tensor(list(itertools.product(range(V), repeat=G + 1)))
    conditional = along(target_law, whole[:, :G], G + 1).gather(-1, whole[..., None])[..., 0]
    return conditional.prod(dim=1).view((V,) * (G + 1))


def shipped_residuals(target: Tensor, draft: Draft, weights: Tensor | None) -> Tensor:
    out = []
    for k in range(G + 1):
        accepted = torch.full((len(target),), k).minimum(draft.lengths)
        weight = None if weights is None else weights.gather(1, accepted[:, None])[:, 0]
        left = residual(target, draft, accepted, weight)
        out.append(left / left.sum(-1, keepdim=True))
    return torch.stack(out, dim=1)


LENGTHS = {
    "full": torch.full((V**G,), G),
    "none": torch.zeros(V**G, dtype=torch.int64),
    # Stopping after a token: decided by what is already drafted, so still a stopping time.
    "ragged": torch.where(SEQUENCES[:, 0] == 2, 1, torch.where(SEQUENCES[:, 1] == 0, 2, G)),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("one_hot", [False, True], ids=["dense", "one-hot"])
@pytest.mark.parametrize("zeros", [False, True], ids=["positive", "with-zeros"])
@pytest.mark.parametrize("rule", ["standard", "block"])
def test_one_round_then_the_target_has_the_targets_law(rule, zeros, one_hot, lengths):
    target_law, draft_law = random_law(1, zeros), random_law(2, zeros)
    draft, chance = drafts(draft_law, one_hot, LENGTHS[lengths])
    target = along(target_law, SEQUENCES, G + 1)
    count_law = torch.zeros(V**G, G + 1, dtype=torch.float64)
    if rule == "standard":
        rates = standard_pass_rates(target, draft)
        weights, alive = None, chance.clone()
        for k in range(G + 1):
            stop = draft.lengths == k
            rate = rates[:, k] if k < G else torch.zeros_like(alive)
            count_law[:, k] = torch.where(stop, alive, alive * (1 - rate))
            alive = torch.where(stop, 0.0, alive * rate)
    else:
        rates = block_pass_rates(target, draft)
        none_longer = chance.clone()
        weights = torch.ones(V**G, G + 1, dtype=torch.float64)
        for k in range(G, 0, -1):
            reach = draft.lengths >= k
            rate = torch.where(reach, rates[:, k - 1], 0.0)
            count_law[:, k] = none_longer * rate
            none_longer = none_longer * (1 - rate)
            only_k = torch.full_like(rates, 2.0)
            only_k[:, k - 1] = 0.0
            accepted, weight = accept_block(target, draft, only_k)
            weights[:, k] = torch.where(accepted == k, weight, 1.0)
        count_law[:, 0] = none_longer
    law = emitted_law(
        target_law, target, draft, count_law, shipped_residuals(target, draft, weights)
    )
    assert float((law - target_joint(target_law)).abs().max()) < EXACT


@pytest.mark.parametrize("rule", ["unweighted block residual", "one-hot kept", "lenient"])
def test_enumeration_catches(rule):
    """The oracle's own controls: wrong residuals and a lenient test move it far beyond 1e-12."""
    target_law, draft_law = random_law(1), random_law(2)
    draft, chance = drafts(draft_law, rule == "one-hot kept", LENGTHS["full"])
    target = along(target_law, SEQUENCES, G + 1)
    rates = standard_pass_rates(target, draft)
    residuals = shipped_residuals(target, draft, None)
    if rule == "lenient":
        rates = (1.01 * rates).clamp(max=1.0)
    elif rule == "one-hot kept":
        residuals = target
    else:
        rates = block_pass_rates(target, draft)
    count_law = torch.zeros(V**G, G + 1, dtype=torch.float64)
    if rule == "unweighted block residual":
        left = chance.clone()
        for k in range(G, 0, -1):
            count_law[:, k] = left * rates[:, k - 1]
            left = left * (1 - rates[:, k - 1])
        count_law[:, 0] = left
    else:
        alive = chance.clone()
        for k in range(G):
            count_law[:, k] = alive * (1 - rates[:, k])
            alive = alive * rates[:, k]
        count_law[:, G] = alive
    law = emitted_law(target_law, target, draft, count_law, residuals)
    assert float((law - target_joint(target_law)).abs().max()) > 1e-5


def test_coupled_emits_the_targets_own_draws():
    target = along(random_law(1), SEQUENCES, G + 1)
    keys = torch.randint(-(2**62), 2**62, (V**G, G + 1), generator=torch.Generator().manual_seed(0))
    own = race(target, keys)
    verdict = verify_coupled(target, Draft(SEQUENCES, None, LENGTHS["ragged"]), keys)
    emitted = verdict.tokens >= 0
    assert torch.equal(verdict.tokens[emitted], own[emitted])
    assert torch.equal(emitted.sum(1), verdict.accepted + 1)
    agree = (own[:, :G] == SEQUENCES).long().cumprod(1).sum(1)
    assert torch.equal(verdict.accepted, agree.minimum(LENGTHS["ragged"]))
