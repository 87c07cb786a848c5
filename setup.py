"""Compile the native kernels while the package is installed; without a compiler the package installs all the same."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build as native  # noqa: E402  (csrc/build.py)


class BuildKernels(build_ext):
    """Run csrc/build.py in place of setuptools' own compilation."""

    def run(self) -> None:
        """Build every level, into the source tree for an editable installation."""
        output = native.LIBRARIES if self.inplace else Path(self.build_lib) / "kimi_linear" / "_lib"
        try:
            native.build(output)
        except native.BuildError as error:
            print(f"warning: installed without native kernels, which is slower on a CPU. {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """Return the libraries that were built."""
        return [str(path) for path in Path(self.build_lib).rglob("libkimi_linear_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        """Return nothing: an editable installation finds the libraries in the source tree."""
        return {}


# The extension only says that there is something to compile; its name is no module.
setup(ext_modules=[Extension("kimi_linear._lib", sources=[])], cmdclass={"build_ext": BuildKernels})
