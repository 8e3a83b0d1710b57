"""Where a round's time goes."""

from __future__ import annotations

import time
from typing import Any

import torch


class PhaseClock:
    """Attributes the time between marks to phases.

    On CUDA it records events and reads them in ``stop``, by when the round's device-to-host copy
    has waited for the device anyway; host work that overlaps the device is then not counted twice.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forget earlier marks and start counting."""
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        """Everything since the last mark was ``phase``."""
        self._marks.append((phase, self._now()))

    def stop(self) -> dict[str, float]:
        """Seconds per phase since ``start``; phases may have been marked several times."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(("draft", "verify", "sample", "host"), 0.0)
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = before.elapsed_time(after) / 1e3 if self._cuda else after - before
            seconds[phase] = seconds.get(phase, 0.0) + elapsed
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # not that of the current device
        return event
