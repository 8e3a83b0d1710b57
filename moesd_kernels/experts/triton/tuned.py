"""Tuning results: ``<device>.json`` here in ``configs`` or in a folder that the caller names.

A file is ``{"device", "triton", "entries": [...]}``; an entry names the layer (E, K, H, I, gated),
dtype and T, and gives a configuration's fields. ``python -m bench tune`` writes such files. A file
may make blocks lower than the selector would, where rereading a few experts through the cache was
measured to cost less; never taller.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .types import LayerShape, LayerTiles, TileConfig

FOLDER = Path(__file__).parent / "configs"

TILES = ("gate_up", "down", "single_gate_up", "single_down")

# An entry serves numbers of tokens up to this factor away.
REACH = 2.0

# (layer, dtype) -> T -> tiles.
Entries = dict[tuple[tuple[int, int, int, int, bool], str], dict[int, LayerTiles]]


def config_path(device_name: str, folder: Path = FOLDER) -> Path:
    """Where a device's file lies."""
    return folder / f"{device_name.replace(' ', '_')}.json"


_folders = [FOLDER]


def use_folder(folder: Path | None) -> None:
    """Read files of ``folder`` too, from the next call on; its entries go before the package's.

    Files are read once: call this again when one has changed. None forgets the folder.
    """
    _folders[1:] = [] if folder is None else [Path(folder)]
    tuned_tiles.cache_clear()
    _entries.cache_clear()


@functools.lru_cache(maxsize=4096)
def tuned_tiles(
    device_name: str, layer: tuple[int, int, int, int, bool], dtype: str, T: int
) -> LayerTiles | None:
    """The device's entry for the number of tokens nearest to T, in proportion; None if there is
    none near.

    One token's entry serves one token only: its kernels are others.
    """
    at = _entries(device_name).get((layer, dtype), {})
    if T == 1:
        return at.get(1)
    near = min((t for t in at if t > 1), key=lambda t: abs(math.log(t / T)), default=None)
    return at[near] if near and max(near / T, T / near) <= REACH else None


@functools.cache
def _entries(device_name: str) -> Entries:
    """The device's entries; none if it has no file. Read once per process and folder."""
    found: Entries = {}
    for folder in _folders:
        path = config_path(device_name, folder)
        for key, at in load(path).items() if path.exists() else ():
            found[key] = found.get(key, {}) | at
    return found


def load(path: Path) -> Entries:
    """Read a file.

    Raises:
        ValueError: an entry is not what this version expects; the message names file and entry.
    """
    configs: Entries = {}
    for number, entry in enumerate(json.loads(path.read_text())["entries"]):
        try:
            layer = (entry["E"], entry["K"], entry["H"], entry["I"], entry["gated"])
            tiles = {name: entry[name] and TileConfig(**entry[name]) for name in TILES}
            chosen = LayerTiles(**tiles, inline_pairs=entry["inline_pairs"])
            configs.setdefault((layer, entry["dtype"]), {})[int(entry["T"])] = chosen
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: entry {number} cannot be used: {error!r}") from error
    return configs


def entry_of(shape: LayerShape, dtype: str, config: LayerTiles) -> dict[str, Any]:
    """The file's form of one choice for ``shape.T`` tokens."""
    layer = {"E": shape.E, "K": shape.K, "H": shape.H, "I": shape.I, "gated": shape.gated}
    return layer | {"dtype": dtype, "T": shape.T} | asdict(config)
