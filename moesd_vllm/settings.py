"""Whether our experts are wanted: ``MOESD_VLLM``, or ``moesd`` in vLLM's ``--additional-config``.

Who installs this package beside vLLM wants them, so they are on unless one of the two says "off".
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from .versions import logger

VARIABLE = "MOESD_VLLM"
KEY = "moesd"
EXPERTS, OFF = "experts", "off"


def experts_wanted(additional_config: Mapping[str, Any] | object = None) -> bool:
    """Whether neither the environment nor vLLM's ``additional_config`` says "off".

    A word that is neither "experts" nor "off" is one line in the log, and "off".
    """
    said = {f"environment variable {VARIABLE}": os.environ.get(VARIABLE) or EXPERTS}
    if isinstance(additional_config, Mapping):
        # As text: whatever JSON has there.
        word = additional_config.get(KEY, EXPERTS)
        said[f"additional_config[{KEY!r}]"] = word if isinstance(word, str) else repr(word)
    return all(_is_experts(place, word) for place, word in said.items())


@functools.cache  # said once, though every layer asks
def _is_experts(place: str, word: object) -> bool:
    if word not in (EXPERTS, OFF):
        logger.warning(
            "moesd: expected %s to be %r or %r, got %s: vLLM's experts stay its own",
            place,
            EXPERTS,
            OFF,
            word,
        )
    return word == EXPERTS
