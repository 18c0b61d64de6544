"""Adds to pyproject.toml what it cannot say: the C++ kernels, compiled on installation where there is a compiler."""

import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

kernels = runpy.run_path(str(Path("mimoflash", "kernels", "compile.py")))


class BuildKernels(build_ext):
    """Plain shared libraries, not Python modules; without a compiler the package runs on PyTorch alone."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        try:
            kernels["compile_library"](ext.name.split(".")[-1], Path(self.get_ext_fullpath(ext.name)))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"mimoflash: no kernels for {ext.name}: {error}", file=sys.stderr)


FOLDER = "mimoflash/kernels/cpu"
setup(
    ext_modules=[
        Extension(f"mimoflash.kernels.cpu.{name}", [f"{FOLDER}/{file}" for file in kernels["SOURCES"]], optional=True)
        for name in kernels["INSTRUCTION_SETS"]
    ],
    cmdclass={"build_ext": BuildKernels},
)
