"""Texts that a machine with a package index has: packages' sources, and their documentation.

Documents are taken in an order given by a hash of their names until each package's share is full,
so that no package outweighs the others and the order of files on a disk does not matter.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

from training.data import docstrings, is_held_out, share, source_files

STDLIB = "python"
CHARS = 500_000  # of code and of documentation, from each package
STDLIB_CHARS = 3_000_000
# Import name: distribution.
PACKAGES = {
    "huggingface_hub": "huggingface_hub",
    "jinja2": "Jinja2",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "rich": "rich",
    "scipy": "scipy",
    "setuptools": "setuptools",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}


@dataclass
class Sources:
    """Documents by part (``train``, ``held_out``) and kind (``code``, ``docs``), with versions."""

    train: dict[str, list[str]] = field(default_factory=lambda: {"code": [], "docs": []})
    held_out: dict[str, list[str]] = field(default_factory=lambda: {"code": [], "docs": []})
    versions: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        """Versions, sizes in characters and a hash over every document."""
        digest = hashlib.sha256()
        sizes = {}
        for part in ("train", "held_out"):
            for kind, documents in getattr(self, part).items():
                sizes[f"{part}_{kind}_chars"] = sum(map(len, documents))
                for document in documents:
                    digest.update(document.encode())
        return {"versions": self.versions, **sizes, "sha256": digest.hexdigest()}


def build_sources() -> Sources:
    """Read the documents of the installed versions; equal versions give equal documents."""
    sources = Sources()
    for name, root, version, limit in _roots():
        sources.versions[name] = version
        files = sorted(source_files(root), key=lambda file: share(f"{name}/{file[0]}", "order"))
        sizes = {"code": 0, "docs": 0}
        for path, text in files:
            part = sources.held_out if is_held_out(f"{name}/{path}") else sources.train
            found = {"code": [text], "docs": docstrings(text)}
            for kind, documents in found.items():
                if sizes[kind] < limit:
                    part[kind].extend(documents)
                    sizes[kind] += sum(map(len, documents))
            if min(sizes.values()) >= limit:
                break
    return sources


def _roots() -> Iterator[tuple[str, Path, str, int]]:
    version = sysconfig.get_python_version()
    yield STDLIB, Path(sysconfig.get_paths()["stdlib"]), version, STDLIB_CHARS
    for name, project in PACKAGES.items():
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"expected {project} to be installed: its sources are read")
        yield name, Path(spec.origin).parent, distribution(project).version, CHARS
