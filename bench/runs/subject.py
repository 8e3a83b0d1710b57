"""What a decode measurement is made on, and the decoders made of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decoder import SpeculativeDecoder
from decoder.drafters import ReplayDrafter, build_drafter
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.heads.eagle_config import EagleCheckpoint
from decoder.drafters.independent import IndependentDrafter
from decoder.engine.profile_rounds import RoundLog
from decoder.sampling.sampler import VerifierName
from moesd_kernels.formats import QuantizedLinear


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a target, a draft, and the acceptance imposed on it.

    Attributes:
        draft: a draft model, an ``EagleCheckpoint``, the name of a drafter that reads neither, or
            None: proposals cost nothing.
        alpha: acceptance per token imposed by the replay drafter; None uses the draft's own.
        prompts: token ids that batches are taken from in turn; None makes random ones.
        verifier: where replay meets sampling, ``coupled``: its output is the target's own for the
            seed, so that a recorded continuation stays the right answer.
    """

    target: Any
    draft: Any | None
    alpha: float | None
    temperature: float = 0.0
    prompts: Sequence[list[int]] | None = None
    verifier: VerifierName = "standard"

    @property
    def comparable(self) -> bool:
        """Whether speculative outputs are to be the autoregressive ones, token for token."""
        return not self.forced and (not self.temperature or self.verifier == "coupled")

    @property
    def forced(self) -> bool:
        """Whether replay decides instead of the target: where rounding depends on shapes."""
        return self.alpha is not None and self.target.device.type == "cuda"

    @property
    def top_k(self) -> int | None:
        """Experts per token, None for a dense target."""
        return getattr(self.target.config, "num_experts_per_tok", None)


def logged_decoder(
    subject: Subject, drafter: Any, batch: int, length: int, max_gamma: int
) -> SpeculativeDecoder:
    """A decoder of ``batch`` rows whose controller keeps what it is told of each round."""
    return SpeculativeDecoder(
        subject.target,
        drafter=drafter,
        gamma=RoundLog(max_gamma=max_gamma),
        verifier=subject.verifier,
        max_batch_size=batch,
        max_length=length,
    )


def drafter_for(subject: Subject) -> Any:
    """The drafter that imposes the subject's acceptance at its draft's cost."""
    draft: Any = None
    if isinstance(subject.draft, str):
        draft = build_drafter(subject.draft, subject.target)
    elif isinstance(subject.draft, EagleCheckpoint):
        draft = EagleDrafter(subject.draft, kernels=True)
    elif subject.draft is not None:
        draft = IndependentDrafter(_own(subject.draft), hasten=True)
    return draft if subject.alpha is None else ReplayDrafter(subject.alpha, cost=draft)


def _own(draft: Any) -> Any:
    """A draft that one decoder may change: what packed layers become is decided by its batch size.

    A whole copy, as weights that are another model's, too, cannot be joined, and the copy would run
    module by module. Plain weights stay as they are, and need none.
    """
    packed = any(type(module) is QuantizedLinear for module in draft.modules())
    return copy.deepcopy(draft) if packed else draft
