"""Tuning results: ``<device>.json`` here in ``configs`` or in a folder that the caller names.

A file is ``{"device", "triton", "entries": [...]}``; an entry names the layer (E, K, H, I, gated),
dtype and bucket (tokens per expert, a power of two) and gives a configuration's fields.
``python -m bench tune`` writes such files. A file may make blocks lower than the selector would,
where rereading a few experts through the cache was measured to cost less; never taller.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .types import LayerShape, LayerTiles, TileConfig

FOLDER = Path(__file__).parent / "configs"

TILES = ("gate_up", "down", "single_gate_up", "single_down")

Key = tuple[tuple[int, int, int, int, bool], str, float]


def config_path(device_name: str, folder: Path = FOLDER) -> Path:
    """Where a device's file lies."""
    return folder / f"{device_name.replace(' ', '_')}.json"


_folders = [FOLDER]


def use_folder(folder: Path | None) -> None:
    """Read files of ``folder`` too, from the next call on; its entries go before the package's.

    Files are read once: call this again when one has changed. None forgets the folder.
    """
    _folders[1:] = [] if folder is None else [Path(folder)]
    tuned_configs.cache_clear()


@functools.cache
def tuned_configs(device_name: str) -> dict[Key, LayerTiles]:
    """The device's entries; none if it has no file. Read once per process and folder."""
    found: dict[Key, LayerTiles] = {}
    for folder in _folders:
        path = config_path(device_name, folder)
        found |= load(path) if path.exists() else {}
    return found


def load(path: Path) -> dict[Key, LayerTiles]:
    """Read a file.

    Raises:
        ValueError: an entry is not what this version expects; the message names file and entry.
    """
    configs = {}
    for number, entry in enumerate(json.loads(path.read_text())["entries"]):
        try:
            dimensions = (entry["E"], entry["K"], entry["H"], entry["I"], entry["gated"])
            key = (dimensions, entry["dtype"], float(entry["bucket"]))
            tiles = {name: entry[name] and TileConfig(**entry[name]) for name in TILES}
            configs[key] = LayerTiles(**tiles, inline_pairs=entry["inline_pairs"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: entry {number} cannot be used: {error!r}") from error
    return configs


def entry_of(shape: LayerShape, dtype: str, bucket: float, config: LayerTiles) -> dict[str, Any]:
    """The file's form of one choice."""
    layer = {"E": shape.E, "K": shape.K, "H": shape.H, "I": shape.I, "gated": shape.gated}
    return layer | {"dtype": dtype, "bucket": bucket} | asdict(config)
