"""How many of the head's drafts its target would accept, along given text.

A draft is decided on where all before it were right and the text went the target's greedy way; on
the target's own greedy output this is the acceptance of drafting itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .data import Batch
from .head import Eagle3

TURN = 1  # `<|im_start|>`; the role and a line break follow it
HEADER = 3


@dataclass
class Acceptance:
    """Counts by draft depth, over batches."""

    reached: torch.Tensor  # int64 [depths], drafts decided on
    passed: torch.Tensor  # int64 [depths], those that were the target's arg-max
    overlap: float = 0.0  # summed sampling acceptance of the first draft at temperature 1

    @property
    def by_depth(self) -> list[float]:
        """Acceptance of the draft at each depth, given that those before it were accepted."""
        return (self.passed / self.reached.clamp(min=1)).tolist()

    @property
    def alpha(self) -> float:
        """Accepted drafts over drafts decided on."""
        return float(self.passed.sum() / self.reached.sum().clamp(min=1))

    @property
    def sampled(self) -> float:
        """Acceptance of the first draft at temperature 1."""
        return self.overlap / max(1, int(self.reached[0]))


def answered(batch: Batch) -> torch.Tensor:
    """bool ``[B, L]``: places of a conversation's last turn, all places of other text."""
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    last_turn = torch.where(batch.ids == TURN, places + HEADER, 0).amax(1)
    return batch.real & (places >= last_turn[:, None])


@torch.no_grad()
def acceptance(
    head: Eagle3, target, vocabulary: torch.Tensor, batches: list[Batch], depths: int
) -> Acceptance:
    """Greedy acceptance of chains of ``depths`` drafts, and the first draft's when sampling.

    Args:
        head: the head, in any state of training.
        target: the module that annotated ``batches``; its ``lm_head`` reads them.
        vocabulary: int64 ``[draft vocabulary]``, target ids.
        batches: of held-out text.
        depths: length of the chains.
    """
    embedding = target.get_input_embeddings().weight
    rows = target.lm_head.weight[vocabulary]
    reached, passed = torch.zeros(2, depths, dtype=torch.int64)
    result = Acceptance(reached, passed)
    for batch in batches:
        with torch.autocast(batch.ids.device.type, torch.bfloat16):
            embeds = F.embedding(batch.ids[:, 1:-1], embedding)
            outputs = head.depths(embeds, batch.features[:, :-2], depths)
            wanted = target.lm_head(batch.last[:, 1:-1])
            drafts = [vocabulary[(out @ rows.T).argmax(-1)] for out in outputs]
            first = (outputs[0] @ rows.T).float().softmax(-1)
        choice = wanted.argmax(-1)
        counted = answered(batch)[:, 2:]
        own = torch.minimum(wanted.float().softmax(-1)[..., vocabulary], first).sum(-1)
        result.overlap += float(own[counted].sum())
        for depth, draft in enumerate(drafts):
            right = (draft == choice) & counted
            reached[depth] += int(counted.sum())
            passed[depth] += int(right.sum())
            # Depth d + 1 at the next place goes on from a right draft that the text follows.
            goes_on = right & (choice == batch.ids[:, 2:])
            counted = F.pad(goes_on, (1, 0))[:, :-1] & batch.real[:, 2:]
    return result
