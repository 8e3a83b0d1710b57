"""What some versions of the tools cannot do. Tests that need it are marked by these names alone."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version


def _older(distribution: str, version: str) -> bool:
    try:
        return Version(metadata.version(distribution)) < Version(version)
    except metadata.PackageNotFoundError:
        return False


needs_loops_in_the_interpreter = pytest.mark.skipif(
    _older("triton", "3.7") and not _older("numpy", "2.4"),
    reason="Triton's interpreter before 3.7 reads loop bounds as NumPy before 2.4 allowed",
)


def _transformers_of_the_families_page() -> str:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    found = re.search(r"transformers ([\w.]+) by", text)
    return found.group(1) if found else "none"


FAMILIES_PAGE_IS_OURS = metadata.version("transformers") == _transformers_of_the_families_page()
needs_the_transformers_of_the_families_page = pytest.mark.skipif(
    not FAMILIES_PAGE_IS_OURS,
    reason=f"docs/families.md was made with transformers {_transformers_of_the_families_page()}",
)
