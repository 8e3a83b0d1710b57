"""What the decoder's files may import: one of them our kernels, the light ones no transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "decoder").rglob("*.py"))

# What the command line's help needs, and nothing of it may load a model library.
LIGHT = (
    "decoder",
    "decoder.drafters",
    "decoder.sampling",
    "decoder.model.kernels",
    "decoder.gamma",
)


def modules(path: Path) -> Iterator[str]:
    """Everything that a file imports or reaches as an attribute, dotted."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def importers(*prefixes: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(f"{name}.".startswith(f"{p}.") for name in modules(path) for p in prefixes)
    }


def test_one_file_meets_our_kernels() -> None:
    names = ("moesd_kernels", "torch.ops.moesd", "torch.classes.moesd")
    assert importers(*names) == {"decoder/model/kernels.py"}


def test_the_controller_needs_no_forecast() -> None:
    users = importers("decoder.perf_model")
    assert users == {
        path for path in users if path.startswith(("decoder/perf_model/", "decoder/cli"))
    }


def test_light_modules_need_neither_transformers_nor_kernels() -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'moesd_kernels', 'triton', 'rich', 'scipy'):\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
        f"import {', '.join(LIGHT)}\n"
        "from decoder.__main__ import main\n"
        "main(['generate', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--drafter" in done.stdout
