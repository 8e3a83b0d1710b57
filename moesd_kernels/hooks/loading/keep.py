"""``keep_quantized``: transformers' loaders told that somebody here reads quantised weights.

On a machine without a GPU they unpack FP8 and MXFP4 checkpoints to 16 bits, because their own
kernels do not run there. Ours do: inside the block the weights stay as the files hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .mxfp4 import mxfp4_quantizer


@contextmanager
def keep_quantized() -> Iterator[None]:
    """Within this block ``from_pretrained`` keeps FP8 and MXFP4 weights packed on a CPU.

    ``accelerate`` the model after it: nothing else computes with such weights there. With a GPU,
    and for every other way to quantise, nothing changes. The block is for one thread at a time.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    known: dict[str, Any] = AUTO_QUANTIZER_MAPPING
    makers = {"fp8": _fp8_quantizer, "mxfp4": mxfp4_quantizer}
    before = {} if torch.cuda.is_available() else {n: known[n] for n in makers if n in known}
    known.update({name: makers[name](theirs) for name, theirs in before.items()})
    try:
        yield
    finally:
        known.update(before)


def _fp8_quantizer(theirs: Any) -> Any:
    """transformers' quantizer of FP8 checkpoints, which does not ask for a GPU."""

    class OnCpu(theirs):
        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            if not self.pre_quantized:
                super().validate_environment(*args, **kwargs)

    return OnCpu
