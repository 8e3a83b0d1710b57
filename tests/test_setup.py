"""What is installed or handed on can be built: the C++ sources go with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
NO_BUILDS = shutil.ignore_patterns("*.so", "__pycache__")
SOURCES = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_sources_are_in_archives_and_in_installed_packages(tmp_path: Path) -> None:
    checkout, installed = tmp_path / "check out", tmp_path / "installed"
    for folder in ("moesd_kernels", "csrc"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=NO_BUILDS)
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    stale = installed / "moesd_kernels" / "csrc" / "cpu" / "ops" / "gone.cpp"
    stale.parent.mkdir(parents=True)
    stale.touch()
    run(checkout, "setup.py", "-q", "sdist", "-d", "out", "build_py", "--build-lib", str(installed))
    (archive,) = (checkout / "out").iterdir()
    with tarfile.open(archive) as opened:
        packed = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    assert packed >= SOURCES, sorted(SOURCES - packed)
    package = installed / "moesd_kernels"
    assert {f.relative_to(package) for f in package.glob("csrc/**/*") if f.is_file()} == SOURCES
    found = run(
        installed, "-c", "from moesd_kernels import library; print(library._source_files('cpu')[0])"
    )
    assert Path(found).is_relative_to(package), found
