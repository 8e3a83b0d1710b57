"""What some versions of the tools cannot do. Tests that need it are marked by these names alone."""

from __future__ import annotations

from importlib import metadata

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
