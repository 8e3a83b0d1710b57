"""The folders of ``bench`` import in one direction, the one its docstring gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import bench

ROOT = Path(bench.__file__).parent


def imported_folders(source: str) -> set[str]:
    """Folders of bench that a module imports anything from, wherever in it and for whatever."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("bench.")}


def test_a_folder_imports_only_from_those_below_it():
    order = re.findall(r"^- ``(\w+)``:", bench.__doc__ or "", flags=re.MULTILINE)
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(order) == folders
    for place, folder in enumerate(order):
        for path in (ROOT / folder).glob("*.py"):
            above = imported_folders(path.read_text()) & set(order[:place])
            assert not above, f"{folder}/{path.name} imports from {sorted(above)}"
