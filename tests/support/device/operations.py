"""What an accelerator is asked to do, operation by operation."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OperationLog(TorchDispatchMode):
    """Names of the operations in a block, views included, and ``"tolist"`` for a copy to the host.

    What a graph replays is not among them. Composite operations count as what they are made of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._inside = 0  # composites within composites
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> OperationLog:
        if not self._inside:
            tolist = Tensor.tolist

            def logged(x: Tensor) -> Any:
                self.names.append("tolist")
                return tolist(x)

            self._patch.setattr(Tensor, "tolist", logged)
        self._inside += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._inside -= 1
        if not self._inside:
            self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            made_of = func.decompose(*args, **(kwargs or {}))
        if made_of is not NotImplemented:
            return made_of
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
