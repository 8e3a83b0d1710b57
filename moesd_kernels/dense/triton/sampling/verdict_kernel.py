"""The layout of a verdict, and drafts compared with the target's own tokens, in one launch.

Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from ..launch import check_like, dependent_launch


@triton.jit
def store_verdict(out_ptr, tokens_ptr, b, accepted, next_token, G, G_PAD: tl.constexpr):
    """Row b of ``[B, G + 1]``: its accepted drafts, the token after them, then -1."""
    i = tl.arange(0, G_PAD)
    token = tl.load(tokens_ptr + b * G + i, mask=i < accepted, other=-1)
    tl.store(out_ptr + b * (G + 1) + i, tl.where(i == accepted, next_token, token), mask=i <= G)


@triton.jit
def _agree_kernel(
    own_ptr,  # [B, G + 1] int64
    tokens_ptr,  # [B, G] int64
    lengths_ptr,  # [B] int64
    accepted_ptr,  # [B] int64
    out_ptr,  # [B, G + 1] int64
    G,
    G_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (B,)."""
    pdl_wait(PDL)
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, G_PAD)
    token = tl.load(tokens_ptr + b * G + i, mask=i < G, other=-1)
    own = tl.load(own_ptr + b * (G + 1) + i, mask=i <= G, other=-1)
    agrees = (token == own) & (i < tl.load(lengths_ptr + b))
    accepted = tl.min(tl.where(agrees, G_PAD, i), 0)
    tl.store(accepted_ptr + b, accepted.to(tl.int64))
    store_verdict(out_ptr, tokens_ptr, b, accepted, own, G, G_PAD)


def agree(own: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps drafts while they equal the target's own tokens, of which one follows them.

    Args:
        own: ``[B, G + 1]`` int64.
        tokens: ``[B, G]`` int64 drafts.
        lengths: ``[B]`` int64, how many of them are valid.

    Returns:
        Accepted counts ``[B]`` int64, and ``[B, G + 1]`` int64: the accepted drafts, the token
        after them, then -1.

    Raises:
        TypeError, ValueError: a dtype or shape other than these.
    """
    B, G = tokens.shape
    check_like(own, "own", [B, G + 1], torch.int64)
    check_like(tokens, "tokens", [B, G], torch.int64)
    check_like(lengths, "lengths", [B], torch.int64)
    accepted, out = torch.empty_like(lengths), torch.empty_like(own)
    if B:
        _agree_kernel[(B,)](
            *(own.contiguous(), tokens.contiguous(), lengths.contiguous(), accepted, out, G),
            G_PAD=triton.next_power_of_2(G + 1),
            **dependent_launch(own.device),
            num_warps=1,
        )
    return accepted, out
