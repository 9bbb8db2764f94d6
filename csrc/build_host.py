"""Builds `megatron_retro.data._native`: host-side C++ (index builders, gathers) bound by pybind11."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from build_toolchain import CompilerMissing, Unit, compile_all, host_compiler, link, say

SOURCES = Path(__file__).resolve().parent / "host"


def build_host(target: Path) -> None:
    """Compile and link; raises CompilerMissing where the package has to do without."""
    try:
        import pybind11
    except ImportError as problem:
        raise CompilerMissing("pybind11 cannot be imported while building; pip install pybind11") from problem
    compiler = host_compiler()
    say(f"host extension with {compiler}")
    includes = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"), f"-I{SOURCES}")
    flags = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-pthread")
    units = [Unit(source, (compiler, *flags, *includes)) for source in sorted(SOURCES.glob("*.cpp"))]
    if not units:
        say("csrc/host holds no sources yet")
        return
    link((compiler, "-pthread"), compile_all(units), target)
