"""The two ways to divide a target, and how long its parts wait for each other."""

from __future__ import annotations

from typing import Literal

Mode = Literal["expert", "tensor"]
DEFAULT_TIMEOUT = 60.0  # seconds
