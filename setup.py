"""Builds the C++ operators ahead of time where possible; everything else is in pyproject.toml.

Without torch at build time (an isolated build) the package is pure Python and compiles its CPU
kernels at first use. To build them here: ``pip install --no-build-isolation -e .``
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cpu_builder():
    """moesd_kernels/extension.py by itself: importing the package is no build step."""
    path = ROOT / "moesd_kernels" / "extension.py"
    spec = importlib.util.spec_from_file_location("moesd_extension", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildCpu(build_ext):
    """Compiles each instruction set with its own flags; torch's builder has one set for all."""

    def build_extension(self, ext):
        builder = cpu_builder()
        compiler = builder.find_compiler()
        if compiler is None:
            print("moesd-kernels: no C++ compiler, building without C++ operators")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        builder.compile_library(target, compiler)


def cuda_extensions():
    """csrc/cuda/*.cu as moesd_kernels._C_cuda: needs nvcc and a torch built for CUDA, not a GPU."""
    import torch
    from torch.utils import cpp_extension

    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
    if not sources or torch.version.cuda is None or cpp_extension.CUDA_HOME is None:
        return []
    # Named, because torch would build for sm_90, and the Hopper kernel's instructions are sm_90a's.
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100")]
    flags = {"cxx": ["-O3"], "nvcc": ["-O3", *archs]}
    return [cpp_extension.CUDAExtension("moesd_kernels._C_cuda", sources, extra_compile_args=flags)]


def build_options():
    """The extensions and their build command, or nothing without torch."""
    if importlib.util.find_spec("torch") is None:
        print("moesd-kernels: torch is not installed, building without C++ operators")
        return {}
    cpu = Extension("moesd_kernels._C", sources=["csrc/register.cpp"])
    cuda = cuda_extensions()
    if not cuda:
        return {"ext_modules": [cpu], "cmdclass": {"build_ext": BuildCpu}}

    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self):
            cpu_only = BuildCpu(self.distribution)
            cpu_only.build_lib, cpu_only.inplace = self.build_lib, self.inplace
            cpu_only.build_extension(cpu)
            self.extensions = cuda
            super().build_extensions()

    return {"ext_modules": [cpu, *cuda], "cmdclass": {"build_ext": Build}}


setup(
    packages=find_packages(include=["moesd_kernels", "moesd_kernels.*", "decoder", "decoder.*"]),
    package_data={"moesd_kernels": ["py.typed", "**/*.json"], "decoder": ["embedded/**/*"]},
    **build_options(),
)
