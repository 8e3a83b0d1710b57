"""The versions of vLLM whose inner workings this package was written against, and tested on."""

from __future__ import annotations

import logging

# Below vLLM's own logger, whose level and handlers it then has.
logger = logging.getLogger("vllm.moesd")

SUPPORTED = ("0.32",)  # major and minor version; what is hooked into is public in none


def supported(what: str) -> bool:
    """Whether vLLM's version is one of these; if not, one line says what stays vLLM's own."""
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) in SUPPORTED:
        return True
    logger.warning(
        "moesd: expected vLLM %s, found %s: %s stay its own",
        " or ".join(f"{version}.x" for version in SUPPORTED),
        vllm.__version__,
        what,
    )
    return False
