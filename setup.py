"""Builds the C++ operators ahead of time where possible; everything else is in pyproject.toml.

Without torch at build time (an isolated build) the package is pure Python and compiles its
kernels at first use, for which their sources are installed in it; so does one that was built for
another torch. To build them here: ``pip install --no-build-isolation -e .``
"""

import importlib.util
import shutil
import sys
import types
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEVICES = ("cpu", "cuda")


def load_builder():
    """moesd_kernels/library.py without its package, whose import needs more than a build has."""
    package = types.ModuleType("moesd_kernels")
    package.__path__ = [str(ROOT / "moesd_kernels")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module("moesd_kernels.library")


class WithSources(build_py):
    """Takes the C++ sources into the package, where ``library.py`` finds them."""

    def run(self):
        super().run()
        if not self.editable_mode:  # a checkout has them beside it
            target = Path(self.build_lib) / "moesd_kernels" / "csrc"
            shutil.rmtree(target, ignore_errors=True)  # an earlier build's
            shutil.copytree(ROOT / "csrc", target)


class Build(build_ext):
    """Compiles each source with its own flags; setuptools has one set for all."""

    def build_extension(self, ext):
        builder = load_builder()
        device = {builder.module_name(device): device for device in DEVICES}[ext.name]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = ROOT / "build" / "objects"
        builder.compile_library(device, target, builder.find_compiler(device), objects)


def build_options():
    """The extensions whose compiler is here; nothing without torch."""
    if importlib.util.find_spec("torch") is None:
        print("moesd-kernels: torch is not installed, building without C++ operators")
        return {}
    builder = load_builder()
    extensions = []
    for device in DEVICES:
        try:
            builder.find_compiler(device)
        except RuntimeError as error:
            print(f"moesd-kernels: building without C++ operators for {device}: {error}")
        else:
            extensions.append(Extension(builder.module_name(device), sources=[]))
    return {"ext_modules": extensions}


setup(
    packages=find_packages(
        include=["moesd_kernels", "moesd_kernels.*", "decoder", "decoder.*", "moesd_vllm"]
    ),
    package_data={
        "moesd_kernels": ["py.typed", "**/*.json"],
        "decoder": ["embedded/**/*", "smol/**/*"],
    },
    cmdclass={"build_py": WithSources, "build_ext": Build},
    **build_options(),
)
