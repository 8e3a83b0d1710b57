"""What the EAGLE-3 head learns from: rows of text in a repeatable order, the target's view of them.

Texts are token ids by domain. A row is at most ROW tokens of one text, at the positions it would
have in use; a batch is rows of about one length, padded on the right.
"""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

ROW = 512
SHORTEST = 16
SHARES = {"chat": 0.65, "code": 0.25, "docs": 0.10}  # of tokens; drafts follow chat's answers
Texts = dict[str, list[list[int]]]
Row = TypeVar("Row", bound=Sized)


def draft_vocabulary(texts: Texts, vocab_size: int, size: int) -> torch.Tensor:
    """The ``size`` most frequent tokens, domains by SHARES: int64 ``[size]``, ascending."""
    total = torch.zeros(vocab_size, dtype=torch.float64)
    for domain, documents in texts.items():
        ids = torch.tensor([token for text in documents for token in text], dtype=torch.int64)
        counts = ids.bincount(minlength=vocab_size).double()
        total += SHARES[domain] * counts / counts.sum().clamp(min=1)
    return total.topk(size).indices.sort().values


def cut(documents: list[list[int]]) -> list[torch.Tensor]:
    """Rows of at most ROW tokens; what would be shorter than SHORTEST is left out."""
    rows = (row for text in documents for row in torch.tensor(text).split(ROW))
    return [row for row in rows if len(row) >= SHORTEST]


def mixed(texts: Texts, seed: int) -> list[torch.Tensor]:
    """Every row once, int64 ``[<= ROW]``, in an order that depends on the seed alone.

    Domains in SHARES of tokens; where one has ended, those that are left.
    """
    random = torch.Generator().manual_seed(seed)
    left = {}
    for domain, documents in texts.items():
        rows = cut(documents)
        left[domain] = [rows[i] for i in torch.randperm(len(rows), generator=random).tolist()]
    tokens = dict.fromkeys(left, 0)
    order = []
    while tokens:
        domain = min(tokens, key=lambda d: tokens[d] / SHARES[d])
        if left[domain]:
            order.append(left[domain].pop())
            tokens[domain] += len(order[-1])
        else:
            del tokens[domain]
    return order


@dataclass
class Batch:
    """Rows padded on the right and what the target computed over them."""

    ids: torch.Tensor  # int64 [B, L]
    real: torch.Tensor  # bool [B, L], not padding
    features: torch.Tensor  # bf16 [B, L, 3 * H], the hidden states that the head fuses
    last: torch.Tensor  # bf16 [B, L, H], after the final norm: what lm_head reads


def grouped(rows: list[Row], tokens: int, length: Callable[[Row], int] = len) -> list[list[Row]]:
    """Groups of rows of about one length, each of at most ``tokens`` tokens with its padding.

    Args:
        rows: tensors, or what stands for them.
        tokens: see above.
        length: of a row.
    """
    groups: list[list[Row]] = []
    for row in sorted(rows, key=length, reverse=True):
        if not groups or (len(groups[-1]) + 1) * length(groups[-1][0]) > tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


@torch.no_grad()
def annotated(target, rows: list[torch.Tensor], layers: list[int], device: str) -> Batch:
    """One batch of ``rows``, and the target's hidden states ``layers`` and last over it."""
    ids = pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    states = target.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in layers], dim=-1)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return Batch(ids, real, features.to(torch.bfloat16), states[-1].to(torch.bfloat16))
