"""What a GGUF file holds, for the lines measured on it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from moesd_kernels.hooks.loading import GgufFile

PLAIN = "plain"


class Contents(NamedTuple):
    """A file in a line.

    Attributes:
        file: its name.
        bytes: its size.
        weight_format: of most of its experts' weights, ``q4_0``, or ``plain`` where they are as
            the model's own; of all matrices in a dense model.
    """

    file: str
    bytes: int
    weight_format: str


def require_own_format(target: str, asked: str) -> None:
    """Refuse to quantise what is quantised.

    Raises:
        ValueError: a GGUF file, which has its own format, is to be stored otherwise.
    """
    if target.endswith(".gguf") and asked != PLAIN:
        raise ValueError(f"{target} has a format of its own, got {asked}")


def contents_of(file: Path) -> Contents:
    """Read a file's header.

    Raises:
        ValueError: it is none of a GGUF file that is read here.
    """
    matrices = [tensor for tensor in GgufFile(file).tensors.values() if len(tensor.shape) > 1]
    experts = [tensor for tensor in matrices if "_exps." in tensor.name] or matrices
    weights: Counter[str] = Counter()
    for tensor in experts:
        weights[tensor.kind if tensor.packed else PLAIN] += math.prod(tensor.shape)
    (most, _), *_ = weights.most_common(1)
    return Contents(file.name, file.stat().st_size, most)
