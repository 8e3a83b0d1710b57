"""Which MoE blocks a checkpoint has, by its tensors' names and its ``config.json``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from moesd_kernels.hooks.blocks import moe_blocks

_BLOCK = re.compile(r"^((?:.*?\.)?)experts\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def prefix_of(names: Iterable[str], layer: int | None, prefix: str | None) -> str:
    """What the names of one block's tensors begin with.

    Args:
        names: of all the checkpoint's tensors.
        layer: the block's layer, or None.
        prefix: given instead of a layer; both None is a checkpoint that is one block.

    Raises:
        ValueError: there is no such layer, it has no experts or several blocks, or nothing begins
            with ``prefix``; the message says what there is.
    """
    names = list(names)
    prefixes = dict.fromkeys(match[1] for name in names if (match := _BLOCK.match(name)))
    if layer is None:
        start = "" if not prefix else prefix.rstrip(".") + "."
        if any(name.startswith(start) for name in names) and (
            start or not prefixes or "" in prefixes
        ):
            return start
        asked = f"prefix={prefix!r} begins no name" if start else "give layer= or prefix="
        raise ValueError(f"{asked}; {_listed(prefixes)}")
    if type(layer) is not int:
        raise ValueError(f"layer must be an integer, got {layer!r}")
    if prefix is not None:
        raise ValueError(f"expected layer= or prefix=, got both {layer} and {prefix!r}")
    fitting = [one for one in prefixes if layer_in(one) == layer]
    if len(fitting) > 1:
        raise ValueError(f"layer {layer} has several blocks, give prefix=: {', '.join(fitting)}")
    if not fitting:
        layers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
        which = "has no experts" if layer in layers else "is not there"
        raise ValueError(f"layer {layer} {which}; {_listed(prefixes)}")
    return fitting[0]


def layer_in(prefix: str) -> int | None:
    """The number of the layer that a prefix names, if it does."""
    match = _LAYER.search(prefix)
    return int(match[1]) if match else None


def block_at(folder: Path, layer: int | None) -> nn.Module:
    """A layer's block without weights, as ``config.json`` gives it.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it is of no known family, or has no such block.
    """
    if layer is None:
        raise ValueError(
            "the prefix names no layer, whose block config.json would give: give config="
        )
    blocks = moe_blocks(folder)
    if layer not in blocks.by_layer:
        raise ValueError(
            f"{folder / 'config.json'} has experts in layers {_ranges(list(blocks.by_layer))} of "
            f"{blocks.layers}, got layer {layer}: give config="
        )
    return blocks.by_layer[layer]


def _listed(prefixes: Iterable[str]) -> str:
    """Where there are experts, numbers of layers in ranges: ``model.layers.{1-3}.mlp.``."""
    numbers: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for prefix in prefixes:
        match = _LAYER.search(prefix)
        start, end = match.span(1) if match else (len(prefix), len(prefix))
        numbers[prefix[:start], prefix[end:]] += [int(match[1])] if match else []
    shown = []
    for (before, after), found in numbers.items():
        ranges = f"{{{_ranges(found)}}}" if len(found) > 1 else "".join(map(str, found))
        shown.append(f"{before}{ranges}{after}" or "''")
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"there are experts below {', '.join(shown[:4])}{more}" if shown else "none has experts"


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs) or "none"
