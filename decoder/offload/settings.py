"""What the owner of a model whose experts do not fit has to say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from decoder.errors import UserError


@dataclass(frozen=True, slots=True)
class Offload:
    """How to run a model whose experts do not fit in memory.

    Attributes:
        budget: bytes of memory for experts where they are computed; at least one layer's.
        folder: of safetensors files to read experts from, a copy on a faster disk; by default the
            model's own.
        host: for a GPU: experts wait in host memory. For a CPU they wait in their files.

    Raises:
        UserError: a budget that is no integer.
    """

    budget: int
    folder: str | Path | None = None
    host: bool = False

    def __post_init__(self) -> None:
        if type(self.budget) is not int:
            raise UserError(f"the budget for experts must be an integer, got {self.budget!r}")
