"""A plugin of vLLM: our experts inside its fused-MoE layer, our choice of the draft length.

vLLM finds ``register`` by the entry point ``moesd`` of group ``vllm.general_plugins`` and calls it
in every process; ``gamma_scheduler`` is for ``--scheduler-cls``. Nothing of vLLM is imported
before one of the two is called, and on a version that is not supported both leave vLLM as it is.
How to use it: ``docs/vllm.md``.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Let vLLM's layers of unquantised experts run on ``moesd_kernels``, unless told not to."""
    from .settings import experts_wanted
    from .versions import supported

    if experts_wanted() and supported("its experts"):
        from .experts import install

        install()


def gamma_scheduler(**arguments: Any) -> Any:
    """A scheduler of vLLM's that chooses the draft length of every step.

    Args:
        arguments: what vLLM gives a scheduler's class.
    """
    from .scheduler import make_scheduler

    return make_scheduler(**arguments)
