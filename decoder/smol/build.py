"""Builds the real model's parts in the cache, once, from a ``Recipe``.

Each part has a folder of its own, so that a new EAGLE head does not have three gigabytes written
again. A folder is filled beside its place and renamed into it when every byte is on disk: it is
whole, or it is not there. One process builds at a time; what one that was killed has left is
removed by the next, and so are older builds of a part (``_SPARE``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from decoder.checkpoint.folder import read_json
from decoder.checkpoint.weights import weight_files
from decoder.errors import UserError, explained
from decoder.model.kernels import cache, cache_folder

from .difference import Difference
from .gguf_file import DenseFile
from .layout import write_draft, write_eagle, write_target
from .recipe import PARTS, Part, Recipe
from .tuned import TUNED_FILE, write_tuned

# Builds of a part that stay beside a new one: two checkouts used in turn do not build by turns.
_SPARE = 1


def folder_of(recipe: Recipe, part: Part) -> Path:
    """A part's folder, built first where it is not there, and the other parts with it.

    It stays there for as long as this process lives, whatever others build.

    Raises:
        UserError: it cannot be built, or its weights are not those that the recipe records.
    """
    if reason := recipe.missing(part):
        raise UserError(f"no {part} of the real model: {reason}")
    place = recipe.place(part)
    while not cache().keep(place):
        _build(recipe, recipe.recorded())
    return place


def record(recipe: Recipe) -> None:
    """Write into the recipe's record what its parts' weights hash to, having built them.

    For whoever has made new assets; what else the record holds stays.

    Raises:
        UserError: they cannot be built.
    """
    _build(recipe, expected=None)
    hashes = {part: content_hash(recipe.place(part)) for part in _makeable(recipe)}
    fields = read_json(recipe.record) if recipe.record.exists() else {}
    text = json.dumps(fields | {"sha256": hashes}, indent=1, ensure_ascii=False)
    recipe.record.write_text(text + "\n", encoding="utf-8")


def content_hash(folder: Path) -> str:
    """SHA-256 over names, shapes, types and bytes of a folder's tensors, in order of names.

    How they are spread over files, and what else stands in the files' headers, does not matter.
    """
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for file in weight_files(folder):
        opened = safe_open(file, framework="pt")
        tensors |= dict.fromkeys(opened.keys(), opened)

    def digest(name: str) -> bytes:
        tensor = tensors[name].get_tensor(name)
        header = f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        return header + hashlib.sha256(data).digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
        return hashlib.sha256(b"".join(pool.map(digest, sorted(tensors)))).hexdigest()


def _makeable(recipe: Recipe) -> list[Part]:
    """The parts whose asset is there."""
    assets = {part: recipe.asset(part) for part in PARTS}
    return [part for part, asset in assets.items() if asset is None or asset.is_file()]


def _build(recipe: Recipe, expected: dict[str, str] | None) -> None:
    """Build the parts that are not there.

    Args:
        recipe: what they are made of.
        expected: part to what its weights must hash to; ``None`` takes what comes.
    """
    root, unfinished = cache_folder("smol"), cache().UNFINISHED
    with explained("cannot build the real model"), cache().locked(root):
        for left in root.glob(f"*{unfinished}"):
            shutil.rmtree(left)
        places = {part: recipe.place(part) for part in _makeable(recipe)}
        places = {part: place for part, place in places.items() if not place.is_dir()}
        folders = {part: place.with_name(place.name + unfinished) for part, place in places.items()}
        try:
            _fill(recipe, folders)
            if expected is not None:
                _require_recorded(recipe, folders, expected)
            for part, folder in folders.items():
                _flush([*folder.iterdir(), folder])
                folder.rename(places[part])
            _flush([root])
        finally:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
        for place in places.values():
            cache().drop_unused(_others(place), _SPARE)


def _others(place: Path) -> list[Path]:
    """Builds of the same part from other inputs."""
    part = place.name.partition("-")[0]
    named = re.compile(rf"{part}-[0-9a-f]{{{len(place.name) - len(part) - 1}}}")
    return [
        other for other in place.parent.iterdir() if other != place and named.fullmatch(other.name)
    ]


def _fill(recipe: Recipe, folders: dict[Part, Path]) -> None:
    if not folders:
        return
    from tqdm import tqdm

    if reason := recipe.unreadable():
        raise UserError(reason)
    assert recipe.file is not None  # it is readable
    file = DenseFile(recipe.file)
    config, dense, tokenizer = file.config(), file.weights(), file.tokenizer()
    for folder in folders.values():
        folder.mkdir(mode=0o700)
    if "draft" in folders:
        draft, asset = dense, recipe.asset("draft")
        if asset:
            tuned = folders["draft"] / TUNED_FILE
            write_tuned(recipe.file, asset, tuned)
            draft = DenseFile(tuned).weights()
        write_draft(folders["draft"], config, draft)
        tokenizer.save_pretrained(folders["draft"])
    asset = recipe.asset("eagle")
    if "eagle" in folders and asset:
        write_eagle(folders["eagle"], asset, dense["model.embed_tokens.weight"])
    asset = recipe.asset("target")
    if "target" in folders and asset:
        tokenizer.save_pretrained(folders["target"])
        layers = config["num_hidden_layers"]
        with tqdm(total=layers, desc="building the real model, once", unit="layer") as bar:
            write_target(folders["target"], config, dense, Difference(asset), bar.update)


def _require_recorded(recipe: Recipe, folders: dict[Part, Path], expected: dict[str, str]) -> None:
    for part, folder in folders.items():
        found = content_hash(folder)
        if found != expected.get(part):
            raise UserError(
                f"the {part}'s weights must hash to {expected.get(part)}, as {recipe.record} "
                f"says, got {found}"
            )


def _flush(paths: Sequence[Path]) -> None:
    """Have files and the folders they stand in on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
