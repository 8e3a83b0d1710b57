"""What the pieces of a suite share: device, sizes, lines, the clock, and models worth keeping.

What a piece is stands here, too, apart from the pieces: a worker starts without what they import.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.measure.ceilings import Ceilings
from bench.suite.progress import Lines
from bench.suite.sizes import Sizes


class OutOfTimeError(Exception):
    """A piece has used up its share; what it found is kept."""


@dataclass
class Session:
    """One worker's surroundings.

    Attributes:
        lines: of the folder.
        sizes: of this run: full or dry.
        source: folder with vLLM's ``fused_moe.py``, or None.
        piece_end: ``time.monotonic()`` at which the running piece must stop.
        grace_s: seconds beyond its time after which a piece hangs; building a model is the longest
            thing that cannot stop in between.
        tuned: whether the back-end looks into the folder's tiles.
        kept: what pieces hold for the next one, such as a model; dropped by ``release``.
        point: of the running piece, what it measures now: left out when the piece goes on, should
            the device be lost to it.
    """

    device: torch.device
    sizes: Sizes
    lines: Lines
    folder: Path
    source: Path | None = None
    piece_end: float = float("inf")
    grace_s: float = 45.0
    tuned: bool = False
    kept: dict[str, Any] = field(default_factory=dict)
    point: str | None = None

    @property
    def cuda(self) -> bool:
        """Whether this is a run on a GPU."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the piece must stop."""
        return self.piece_end - time.monotonic()

    def need(self, seconds: float) -> None:
        """Go on only if the piece has that long.

        Raises:
            OutOfTimeError: it has not; the piece goes on in a later pass or start.
        """
        if self.left() < seconds * self.sizes.patience:
            raise OutOfTimeError

    def ceilings(self) -> Ceilings:
        """As the first piece measured them.

        Raises:
            RuntimeError: it has not.
        """
        found = self.lines.find("roofline")
        if not found:
            raise RuntimeError("expected the ceilings of this machine, which were not measured")
        return Ceilings(**found[-1]["ceilings"])

    def release(self) -> None:
        """Drop what is kept, so that the next piece finds the memory free."""
        self.kept.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def usable(self) -> bool:
        """Whether the device still answers: after an illegal access it never does in a process."""
        try:
            if self.cuda:
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def begin(self, point: str) -> bool:
        """Take up a point; False where the device was lost at it in this start."""
        self.point = point
        return point not in self.lines.lost_in_this_start()

    def free_bytes(self) -> int:
        """Memory of the device that nobody holds; on a CPU a size no preset fits."""
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of the run-book.

    Attributes:
        seconds: its share of eight minutes; it stops itself then and may go on in a later pass.
        run: does it; what it finds becomes lines.
        refusal: why it cannot run here, or None.
    """

    name: str
    seconds: float
    run: Callable[[Session], None]
    refusal: Callable[[Session], str | None] = lambda session: None
