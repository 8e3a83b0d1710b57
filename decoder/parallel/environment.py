"""What ``torchrun`` says in the environment of the processes that it starts."""

from __future__ import annotations

import os

REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_one_of_several() -> bool:
    """Whether ``torchrun`` has started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and world_size() > 1


def world_size() -> int:
    """Processes of this run; 1 where nobody says."""
    return _number("WORLD_SIZE", 1)


def own_rank() -> int:
    """This process's place among them; 0 where it is alone."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Its place among those of this machine, and so its GPU's."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
