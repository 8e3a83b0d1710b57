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
from .own import own_mappings


@contextmanager
def keep_quantized(*, others: bool = True) -> Iterator[None]:
    """Within this block ``from_pretrained`` keeps FP8 and MXFP4 weights packed on a CPU.

    It also loads models that ``quantize`` made and ``save_pretrained`` saved, on any device.

    ``accelerate`` the model after it: nothing else computes with FP8 and MXFP4 on a CPU. With a
    GPU, and for every other way to quantise, nothing changes. The block is for one thread at a
    time.

    Args:
        others: False lets transformers unpack FP8 and MXFP4 as it would without this; it has no way
            to unpack ours.
    """
    from transformers.quantizers import auto

    known: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    makers = {"fp8": _on_cpu, "mxfp4": lambda theirs: mxfp4_quantizer(_on_cpu(theirs))}
    kept = others and not torch.cuda.is_available()
    theirs = {name: known[name] for name in makers if name in known} if kept else {}
    told = own_mappings()
    told["AUTO_QUANTIZER_MAPPING"] |= {name: makers[name](one) for name, one in theirs.items()}
    tables = [(getattr(auto, table), entries) for table, entries in told.items()]
    before = [{name: table.get(name) for name in entries} for table, entries in tables]
    for table, entries in tables:
        table.update(entries)
    try:
        yield
    finally:
        for (table, _), entries in zip(tables, before, strict=True):
            table.update(entries)
            for name in [name for name, entry in entries.items() if entry is None]:
                del table[name]


def _on_cpu(theirs: Any) -> Any:
    """transformers' quantizer, which does not ask for a GPU where weights come packed."""

    class OnCpu(theirs):
        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            if not self.pre_quantized:
                super().validate_environment(*args, **kwargs)

    return OnCpu
