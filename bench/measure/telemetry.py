"""What a run does beside taking time: distinct experts of a layer, operations of a round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class OperationCount(TorchDispatchMode):
    """Counts what PyTorch is asked to do in a block, views included; not what a graph replays."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class ExpertCounter:
    """(tokens, distinct experts) of every expert call seen."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mean_by_tokens(self) -> dict[int, float]:
        """Tokens entering a layer -> mean number of distinct experts it used."""
        grouped: dict[int, list[int]] = defaultdict(list)
        for tokens, distinct in self.calls:
            grouped[tokens].append(distinct)
        return {tokens: sum(seen) / len(seen) for tokens, seen in sorted(grouped.items())}


@contextmanager
def count_experts(model: nn.Module) -> Iterator[ExpertCounter]:
    """Count inside the block. Counting synchronises and costs time: never time inside."""
    counter = ExpertCounter()

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ids = inputs[1]
        counter.calls.append((ids.shape[0], int(ids.unique().numel())))

    experts = [
        m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts")
    ]
    hooks = [module.register_forward_pre_hook(before) for module in experts]
    try:
        yield counter
    finally:
        for hook in hooks:
            hook.remove()
