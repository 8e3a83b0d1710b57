"""The EAGLE-3 head's loss over a large draft vocabulary, fast on a CPU.

The gradient of cross entropy with respect to a hidden state is the difference of two mean output
rows, the draft's and the target's. The target's is computed once, when it annotates a text; the
draft's takes two matrix products and a softmax in bf16, and no logits outlive a chunk.
"""

import torch
import torch.nn.functional as F

from training.teacher import ARGMAX_WEIGHT

from .head import Eagle3
from .lessons import Lesson

DEPTH_WEIGHT = 0.8  # of a depth, over the one before it
CHUNK = 4096  # places whose logits exist at once: a product lays out its matrix anew each time


class DraftLoss(torch.autograd.Function):
    """Summed cross entropy (nats) of frozen output rows against a distribution's mean row.

    Hidden states ``[N, H]``, output rows ``[V, H]`` and the mean of these rows under the wanted
    distribution ``[N, H]``, all of one type, -> scalar fp32.
    """

    @staticmethod
    def forward(ctx, hidden, rows, mean):
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        room = hidden.new_empty(min(CHUNK, len(hidden)), len(rows))
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, min(start + CHUNK, len(hidden)))
            scores = room[: part.stop - part.start]
            torch.mm(hidden[part], rows.T, out=scores)
            highest = scores.amax(-1).float()
            torch.softmax(scores, -1, out=scores)
            # Of the likeliest token: score - log(probability), the softmax's denominator.
            total += (highest - scores.amax(-1).float().log()).sum()
            total -= (hidden[part] * mean[part]).sum(dtype=torch.float32)
            torch.mm(scores, rows, out=gradient[part])
        ctx.save_for_backward(gradient.sub_(mean))
        return total

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def head_loss(
    head: Eagle3, lesson: Lesson, embedding: torch.Tensor, rows: torch.Tensor, depths: int
) -> torch.Tensor:
    """Mean over depths, by DEPTH_WEIGHT, of the cross entropy against the target's distribution.

    The distribution is sharpened towards its arg-max: the one trains acceptance when sampling, the
    other acceptance when greedy.

    Args:
        head: the head.
        lesson: annotated rows.
        embedding: ``[V, H]``, the target's.
        rows: ``[draft vocabulary, H]``, the target's output rows.
        depths: how many to unroll.
    """
    embeds = F.embedding(lesson.ids[:, 1:], embedding)
    outputs = head.depths(embeds, lesson.features[:, :-1], depths)
    losses = []
    for depth, output in enumerate(outputs):
        counted = lesson.counted[:, 1:].clone()
        counted[:, :depth] = False
        choice = lesson.choice[:, 1:][counted]
        mean = torch.lerp(lesson.mean[:, 1:][counted], rows[choice], ARGMAX_WEIGHT)
        total = DraftLoss.apply(output[counted].to(rows.dtype), rows, mean)
        losses.append(total / counted.sum())
    weights = torch.tensor([DEPTH_WEIGHT**depth for depth in range(depths)], device=rows.device)
    return (torch.stack(losses) * weights).sum() / weights.sum()
