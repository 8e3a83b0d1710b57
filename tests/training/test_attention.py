"""Attention over draft depths and the norm against plain PyTorch, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.attention import RMSNorm, chain_attention

B, HEADS, KV_HEADS, LENGTH, SIZE = 2, 6, 2, 9, 4


def plainly(q: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One query at a time: true keys up to t - d, then one key of each later depth."""
    depth, out = len(past) - 1, torch.zeros_like(q)
    for t in range(depth, LENGTH):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            k, v = (
                torch.cat(
                    [past[0][i][:, group, : t - depth + 1]]
                    + [past[m][i][:, group, t - (depth - m), None] for m in range(1, depth + 1)],
                    dim=1,
                )
                for i in (0, 1)
            )
            weights = (q[:, head, t, None] @ k.mT).softmax(-1)
            out[:, head, t] = (weights @ v)[:, 0]
    return out


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_chain_attention_and_its_gradients_are_those_of_one_query_at_a_time(depth: int) -> None:
    torch.manual_seed(depth)
    q = torch.randn(B, HEADS, LENGTH, SIZE, requires_grad=True)
    past = [
        tuple(torch.randn(B, KV_HEADS, LENGTH, SIZE, requires_grad=True) for _ in range(2))
        for _ in range(depth + 1)
    ]
    inputs = [q, *(t for pair in past for t in pair)]
    expected, found = (f(q, past)[:, :, depth:] for f in (plainly, chain_attention))
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    wanted, got = (torch.autograd.grad((x * weights).sum(), inputs) for x in (expected, found))
    torch.testing.assert_close(got, wanted)


def test_the_norm_and_its_gradients_are_pytorchs() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(8, 1e-5)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(3, 5, 8, requires_grad=True)
    expected, found = F.rms_norm(x, (8,), norm.weight, 1e-5), norm(x)
    torch.testing.assert_close(found, expected)
    weights, inputs = torch.randn_like(x), [x, norm.weight]
    wanted, got = (torch.autograd.grad((y * weights).sum(), inputs) for y in (expected, found))
    torch.testing.assert_close(got, wanted)
