"""Builds `csrc`; see `csrc/README.md`. Metadata is in pyproject.toml.

MEGATRON_RETRO_NATIVE=0 builds nothing, MEGATRON_RETRO_CUDA=0 no CUDA kernels. Without a compiler the package installs
all the same, says so, and runs on its references in plain PyTorch.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from build_host import SOURCES, build_host  # noqa: E402
from build_operators import build_operators  # noqa: E402
from build_toolchain import CompilationFailed, CompilerMissing, say, switched_off  # noqa: E402

# The operators are loaded by torch.ops.load_library, so their file carries no Python version.
EXTENSIONS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "megatron_retro.ops._operators": (".so", build_operators),
    "megatron_retro.data._native": (sysconfig.get_config_var("EXT_SUFFIX"), build_host),
    "megatron_retro.retrieval._native": (
        sysconfig.get_config_var("EXT_SUFFIX"),
        partial(build_host, sources=SOURCES / "retrieval"),
    ),
}


class BuildNative(build_ext):
    """Calls one function per extension instead of distutils' compiler."""

    def initialize_options(self) -> None:
        """The extensions side by side: each ends with a file that takes longest."""
        super().initialize_options()
        self.parallel = len(EXTENSIONS)

    def get_ext_filename(self, ext_name: str) -> str:
        """Where the library goes, relative to the package root."""
        full_name = next((name for name in EXTENSIONS if name.endswith(ext_name)), ext_name)
        return ext_name.replace(".", "/") + EXTENSIONS[full_name][0]

    def build_extension(self, ext: Extension) -> None:
        """Build, or say why the package does without."""
        if switched_off("MEGATRON_RETRO_NATIVE"):
            say(f"{ext.name} left out: MEGATRON_RETRO_NATIVE=0")
            return
        try:
            EXTENSIONS[ext.name][1](Path(self.get_ext_fullpath(ext.name)).resolve())
        except CompilerMissing as problem:
            say(f"{ext.name} left out: {problem}")
        except CompilationFailed as problem:
            raise SystemExit(f"csrc: {problem}") from problem


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension(name, sources=[], optional=True) for name in EXTENSIONS],
)
