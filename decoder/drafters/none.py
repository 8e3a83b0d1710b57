"""No drafting: plain autoregressive decoding through the same loop."""

from __future__ import annotations

from decoder.round import Draft, StepState

from .base import StatelessDrafter, empty_draft


class NoDrafter(StatelessDrafter):
    """Proposes nothing; the engine runs it with gamma 0 and never calls ``propose``."""

    name = "none"

    def propose(self, state: StepState, gamma: int) -> Draft:
        return empty_draft(state, gamma)
