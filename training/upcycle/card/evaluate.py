"""What the card says of the target itself: its loss at any K, and which experts it uses.

Weights are the built model's, computed in fp32 by the caller's choice of dtype. Losses are kept per
window of text, so that two models are compared window by window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 512
FORWARD = 4  # windows per forward: enough rows for every expert, 0.4 GB of logits
STARVED = 0.25  # of the fair share: below it an expert is hardly there


class Difference(NamedTuple):
    """Mean of paired differences and its standard error, both in nats per token."""

    mean: float
    error: float


def windows(documents: Sequence[Sequence[int] | Tensor], separator: int, count: int) -> Tensor:
    """Up to ``count`` windows of the joined documents, evenly spread over all of them.

    Args:
        documents: token ids of each.
        separator: id that ends a document.
        count: two at least: a single one has no spread.

    Returns:
        int64 ``[count, WINDOW + 1]``: inputs and, shifted by one, labels.

    Raises:
        ValueError: fewer than two windows of text or asked for.
    """
    stream = torch.tensor([int(t) for document in documents for t in (*document, separator)])
    if len(stream) <= 2 * WINDOW or count < 2:
        raise ValueError(
            f"expected two windows at least of more than {2 * WINDOW} tokens of text, "
            f"got {count} of {len(stream)}"
        )
    every = stream.unfold(0, WINDOW + 1, WINDOW)
    return every[torch.linspace(0, len(every) - 1, min(count, len(every))).round().long()]


@torch.no_grad()
def window_losses(model: Any, rows: Tensor) -> list[float]:
    """Mean cross entropy of each window ``[N, L + 1]``, in nats per token."""
    losses = []
    for part in rows.to(model.device).split(FORWARD):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()  # [N, L, V]
        labels = part[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses.append(each.view(labels.shape).mean(1))
    return torch.cat(losses).tolist()


def difference(losses: Sequence[float], others: Sequence[float]) -> Difference:
    """``losses - others``, window by window, which share the text and so most of their noise.

    Args:
        losses, others: of the same windows, two at least.
    """
    pairs = [loss - other for loss, other in zip(losses, others, strict=True)]
    return Difference(fmean(pairs), stdev(pairs) / math.sqrt(len(pairs)))


def routers(model: nn.Module) -> list[Any]:
    """The routers, by layer; none of a dense model."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    return [module for module in model.modules() if isinstance(module, MixtralTopKRouter)]


@contextmanager
def experts_per_token(model: nn.Module, top_k: int) -> Iterator[None]:
    """Within it the model uses ``top_k`` experts per token, whose weights sum to one as before."""
    found = routers(model)
    before = [router.top_k for router in found]
    try:
        for router in found:
            router.top_k = top_k
        yield
    finally:
        for router, value in zip(found, before, strict=True):
            router.top_k = value


@contextmanager
def counting(model: nn.Module) -> Iterator[Tensor]:
    """Counts int64 ``[layers, E]`` of the tokens that each expert is given while it is in use."""
    found = routers(model)
    counts = torch.zeros(len(found), found[0].num_experts, dtype=torch.int64)

    def count(layer: int) -> Any:
        def hook(module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            ids = output[2].flatten().cpu()  # [T * K]
            counts[layer] += torch.bincount(ids, minlength=module.num_experts)

        return hook

    with ExitStack() as handles:
        for layer, router in enumerate(found):
            handles.callback(router.register_forward_hook(count(layer)).remove)
        yield counts


def score(model: Any, rows: Tensor, top_k: int | None = None) -> dict[str, Any]:
    """Losses of a model over windows and, of a MoE, the load of its experts.

    Args:
        model: a causal LM; with ``top_k`` a Mixtral.
        rows: ``[N, WINDOW + 1]``.
        top_k: experts per token; ``None`` for a dense model.

    Returns:
        ``losses``: of the even windows, then of the odd ones. ``load``: counts
        ``[2, layers, E]`` of these two halves, only with ``top_k``.
    """
    halves = [rows[0::2], rows[1::2]]
    if top_k is None:
        return {"losses": [loss for half in halves for loss in window_losses(model, half)]}
    losses, load = [], []
    with experts_per_token(model, top_k):
        for half in halves:
            with counting(model) as counts:
                losses += window_losses(model, half)
            load.append(counts.tolist())
    return {"losses": losses, "load": load}


def shares(counts: Tensor) -> Tensor:
    """Counts ``[..., E]`` as multiples of the fair share, fp64: 1 where every expert is equal."""
    return counts.double() / counts.double().mean(-1, keepdim=True)


def total_variation(counts: Tensor, others: Tensor) -> Tensor:
    """Distance in [0, 1] of two loads ``[..., E]``: the share of the tokens sent elsewhere."""
    return (shares(counts) - shares(others)).abs().mean(-1) / 2
