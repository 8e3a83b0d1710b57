"""Attention over several draft depths, and the norm: written for what a CPU's memory costs.

Their gradients are by hand: those that autograd derives pass over every score a dozen times.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _Norm(torch.autograd.Function):
    """Root-mean-square norm of ``[..., H]`` times weight ``[H]``, in the type of the input."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
        scale = (square / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale.to(x.dtype)).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale.to(x.dtype)
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0, dtype=weight.dtype)
        along = (product @ weight.to(x.dtype)[:, None]) / x.shape[-1]
        grad_x = (grad * weight.to(x.dtype)).sub_(normed.mul_(along)).mul_(scale.to(x.dtype))
        return grad_x, grad_weight, None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return _Norm.apply(x, self.weight, self.eps)


class _Prefix(torch.autograd.Function):
    """Attention of the query at t over keys up to t - depth; key 0 where there are none.

    Query ``[N, G * L, D]``, G heads one after the other, keys and values ``[N, L, D]``. Outputs:
    ``[N, G * L, D]`` and the logarithm of the sum of exponentials of the scores, fp32
    ``[N, G * L, 1]``.
    """

    @staticmethod
    def forward(ctx, q, k, v, depth):
        length = k.shape[1]
        places = torch.arange(length, device=q.device)
        hidden = places > (places[:, None] - depth).clamp(min=0)
        bias = torch.zeros(length, length, device=q.device, dtype=q.dtype)
        bias = bias.masked_fill_(hidden, -torch.inf).repeat(q.shape[1] // length, 1)
        scores = torch.baddbmm(bias, q, k.mT)
        first = scores[..., :1].to(torch.float32, copy=True)
        weights = torch.softmax(scores, -1, out=scores)
        out = weights @ v
        ctx.save_for_backward(q, k, v, weights, out)
        # Every query sees key 0, whose weight is exp(score - logarithm of the sum).
        return out, first - weights[..., :1].float().log()

    @staticmethod
    def backward(ctx, grad, grad_sum):
        q, k, v, weights, out = ctx.saved_tensors
        shift = (grad_sum - (grad * out).sum(-1, keepdim=True, dtype=torch.float32)).to(q.dtype)
        scores = torch.baddbmm(shift, grad, v.mT).mul_(weights)
        return scores @ k, scores.mT @ q, weights.mT @ grad, None


def chain_attention(q: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention of the deepest draft depth: the query at t of depth d sees true keys up to t - d.

    Of each later depth m it sees the one key at t - (d - m). The first d places mean nothing.

    Args:
        q: ``[B, heads, L, D]``, scaled.
        past: keys and values ``[B, kv heads, L, D]`` of every depth, those of true features first.

    Returns:
        ``[B, heads, L, D]``.
    """
    (k, v), depth = past[0], len(past) - 1
    rows, kv_heads, length, size = k.shape
    grouped = q.reshape(rows * kv_heads, -1, size)
    out, total = _Prefix.apply(grouped, k.flatten(0, 1), v.flatten(0, 1), depth)
    if not depth:
        return out.view_as(q)
    q = q.view(rows, kv_heads, -1, length, size)
    own = [tuple(shifted(t, depth - m)[:, :, None] for t in past[m]) for m in range(1, depth + 1)]
    scores = [total.view(*q.shape[:-1], 1)]
    scores += [(q * key).sum(-1, keepdim=True, dtype=torch.float32) for key, _ in own]
    shares = torch.cat(scores, dim=-1).softmax(-1).to(out.dtype)
    out = out.view_as(q) * shares[..., :1]
    for i, (_, value) in enumerate(own, start=1):
        out = out + shares[..., i, None] * value
    return out.flatten(1, 2)


def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """``[B, heads, L, D]`` moved right along L: index t holds what was at t - by, zeros before."""
    return F.pad(x, (0, 0, by, 0))[:, :, : x.shape[2]] if by else x
