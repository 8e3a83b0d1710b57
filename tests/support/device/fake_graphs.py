"""Graphs of a GPU, acted by a CPU: work is recorded once, and replayed without its Python.

What holds there holds here: a replay reads and writes the very tensors that the recording did,
recorded numbers of the host stay as they were, and what was computed on the way belongs to
the graphs, which overwrite it. A recording may not look at a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import decoder.round
from decoder.model import capture as captures
from decoder.model.capture import CapturedCalls

_WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh", "item")
_GARBAGE = {torch.bool: True}


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class FakeGraph(TorchDispatchMode):
    """Records the operations of a block, and repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in _WAITS:
            raise RuntimeError(f"called a synchronizing operation, {func}")
        result = func(*args, **(kwargs or {}))
        memory = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        fresh = [x for x in tensors(result) if x.untyped_storage().data_ptr() not in memory]
        if fresh or func._schema.is_mutable:  # else it made views
            self._steps.append((func, args, kwargs or {}, fresh))
        return result

    def replay(self) -> None:
        """The work once more, on the data that is there now."""
        self.replays += 1
        with _disable_current_modes(), torch.inference_mode():
            for func, args, kwargs, fresh in self._steps:
                again = func(*args, **kwargs)
                for old, new in zip(fresh, tensors(again) if fresh else [], strict=True):
                    old.copy_(new)
            for _, _, _, fresh in self._steps:
                for x in fresh:
                    x.fill_(_GARBAGE.get(x.dtype, float("nan") if x.is_floating_point() else 77))

    def pool(self) -> tuple[int, int]:
        """Of the memory that all share."""
        return (0, 1)


def fake_graphs(patch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """From here on a CPU is an accelerator whose graphs these are: to look at a tensor would wait.

    Static runners that are made now capture.

    Returns:
        The graphs captured so far.
    """
    made: list[FakeGraph] = []
    new_calls = CapturedCalls.__init__

    def capture(
        run: Callable[[], Any], pool: Any = None, device: Any = None
    ) -> tuple[FakeGraph, Any]:
        run()
        graph = FakeGraph()
        with graph, pytest.MonkeyPatch.context() as strict:
            strict.setattr(Tensor, "tolist", _refused)
            result = run()
        made.append(graph)
        return graph, result

    patch.setattr(captures, "capture", capture)
    patch.setattr(
        CapturedCalls, "__init__", lambda self, _, insist=True: new_calls(self, True, insist)
    )
    patch.setattr(decoder.round, "HOST_DEVICES", frozenset())
    return made


def _refused(x: Tensor) -> None:
    raise RuntimeError("called a synchronizing operation, tolist")
