"""Replay with an imposed verdict: for devices whose rounding depends on the shape of a product.

A GPU's matrix library sums one row and gamma + 1 rows in different orders, so the target's argmax
at a recorded position is not always the recorded token, and replay's acceptance would measure that
instead of ``alpha``. Here every verification is computed as ever and then decided by replay's own
coin: a clean draft is kept, a corrupted one is not, and the next token is the recorded one. Time is
the real one; outputs are the recording by construction and prove nothing. Never used in decoding.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from decoder import SpeculativeDecoder
from decoder.drafters import ReplayDrafter
from decoder.round import Draft, Verdict
from decoder.sampling import Probs, Sampler
from decoder.sampling.verdict import assemble, leading


class ForcedSampler(Sampler):
    """A sampler whose verdicts are those of a replay drafter; ``force`` makes one."""

    replay: ReplayDrafter
    agreed: Tensor  # [2] int64: positions compared, and those where the target agreed

    def plan(self, dtype: torch.dtype) -> Hashable:
        """The sampler's own, and where the recordings are."""
        return super().plan(dtype), self.replay.place

    def verify(self, target: Probs, draft: Draft, rows: Tensor, positions: Tensor) -> Verdict:
        """The sampler's own verification, replaced by the recording where there is one."""
        computed = super().verify(target, draft, rows, positions)
        tokens, known = self.replay.recorded(rows, positions)
        clean = (draft.tokens == tokens[:, :-1]) & known[:, :-1]
        accepted = leading(clean, draft.lengths)
        following = tokens.gather(1, accepted[:, None])[:, 0]
        usable = known.gather(1, accepted[:, None])[:, 0]
        if target.argmax is not None:
            # Behind a rejected draft the target saw another text than the recording's.
            index = torch.arange(tokens.shape[1], device=tokens.device)
            comparable = known & (index <= accepted[:, None])
            agreed = comparable & (target.argmax == tokens)
            self.agreed += torch.stack([comparable.sum(), agreed.sum()])
        forced = assemble(accepted, following, draft.tokens)
        # Behind the end of a recording the row is about to finish: its own verdict will do.
        return Verdict(
            torch.where(usable, forced.accepted, computed.accepted),
            torch.where(usable[:, None], forced.tokens, computed.tokens),
        )

    def agreement(self) -> float | None:
        """Share of emitted positions where the target's own choice was the recorded token."""
        compared, agreed = self.agreed.tolist()
        return agreed / compared if compared else None


def force(decoder: SpeculativeDecoder, replay: ReplayDrafter) -> ForcedSampler:
    """Let ``replay`` decide what ``decoder`` accepts; its drafter must be that ``replay``."""
    sampler = decoder.sampler
    # The drafter is bound to this very object, so it changes its class instead of being replaced.
    sampler.__class__ = ForcedSampler
    assert isinstance(sampler, ForcedSampler)
    sampler.replay = replay
    sampler.agreed = torch.zeros(2, dtype=torch.int64, device=sampler.device)
    return sampler
