"""What the EAGLE-3 head learns from: rows of text in a repeatable order, the target's view of them.

Texts are token ids by domain. A row is at most ROW tokens of one text, at the positions it would
have in use; a batch is rows of about one length, padded on the right.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

ROW = 512
SHORTEST = 16
SHARES = {"chat": 0.65, "code": 0.25, "docs": 0.10}  # of tokens; drafts follow chat's answers
Texts = dict[str, list[list[int]]]


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


class RowStream:
    """Endless rows of all domains in shares of tokens, every epoch of a domain shuffled anew.

    The order depends on the seed and on what was drawn alone, so that a resumed run goes on where
    it stopped.
    """

    def __init__(self, texts: Texts, seed: int):
        self.rows = {domain: cut(documents) for domain, documents in texts.items()}
        self.rows = {domain: rows for domain, rows in self.rows.items() if rows}
        self.seed = seed
        self.drawn = {domain: {"rows": 0, "tokens": 0} for domain in self.rows}

    def take(self, count: int) -> list[torch.Tensor]:
        """The next ``count`` rows, int64 ``[<= ROW]`` each."""
        return [self._next() for _ in range(count)]

    def _next(self) -> torch.Tensor:
        domain = min(self.drawn, key=lambda d: self.drawn[d]["tokens"] / SHARES[d])
        rows, drawn = self.rows[domain], self.drawn[domain]
        epoch, place = divmod(drawn["rows"], len(rows))
        order = torch.Generator().manual_seed(self.seed + epoch)
        row = rows[int(torch.randperm(len(rows), generator=order)[place])]
        drawn["rows"] += 1
        drawn["tokens"] += len(row)
        return row


@dataclass
class Batch:
    """Rows padded on the right and what the target computed over them."""

    ids: torch.Tensor  # int64 [B, L]
    real: torch.Tensor  # bool [B, L], not padding
    features: torch.Tensor  # bf16 [B, L, 3 * H], the hidden states that the head fuses
    last: torch.Tensor  # bf16 [B, L, H], after the final norm: what lm_head reads


def grouped(rows: list[torch.Tensor], tokens: int) -> list[list[torch.Tensor]]:
    """Groups of rows of about one length, each of at most ``tokens`` tokens with its padding."""
    groups: list[list[torch.Tensor]] = []
    for row in sorted(rows, key=len, reverse=True):
        if not groups or (len(groups[-1]) + 1) * len(groups[-1][0]) > tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


@torch.no_grad()
def annotated(target, rows: list[torch.Tensor], layers: list[int], device: str) -> Batch:
    """One batch of ``rows``, and the target's hidden states ``layers`` and last over it."""
    ids = pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    with torch.autocast(device, torch.bfloat16):
        states = target.model(
            input_ids=ids, use_cache=False, output_hidden_states=True
        ).hidden_states
    features = torch.cat([states[layer] for layer in layers], dim=-1)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return Batch(ids, real, features.to(torch.bfloat16), states[-1].to(torch.bfloat16))
