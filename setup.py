"""Builds csrc with CMake and Ninja: rlhf_fast._C and, where nvcc is, rlhf_fast._cuda.

Both are optional: what does not build is left out, and rlhf_fast runs without it.
RLHF_FAST_CUDA=OFF leaves _cuda out where nvcc is.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = Path(__file__).resolve().parent / "csrc"


class BuildWithCMake(build_ext):
    """Each extension is a target and an install component of one CMake project."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        target = ext.name.rpartition(".")[2]
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        try:
            import pybind11

            # Fresh: an isolated build finds Ninja and pybind11 in another place each time.
            configure = ["cmake", "--fresh", "-S", SOURCE, "-B", build, "-G", "Ninja"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}"]
            configure += [f"-DRLHF_CUDA={os.environ.get('RLHF_FAST_CUDA', 'AUTO')}"]
            configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            if ext is self.extensions[0]:
                subprocess.run(configure, check=True)
            for command in (
                ["cmake", "--build", build, "--target", target],
                ["cmake", "--install", build, "--component", target, "--prefix", package],
            ):
                subprocess.run(command, check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.name} is left out: {error}") from error


setup(
    ext_modules=[Extension(f"rlhf_fast.{name}", [], optional=True) for name in ("_C", "_cuda")],
    cmdclass={"build_ext": BuildWithCMake},
)
