"""Builds host-side C++ bound by pybind11: `data._native` from `host/`, `retrieval._native` from `host/retrieval/`."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from build_toolchain import CompilerMissing, Unit, compile_all, host_compiler, link, say

SOURCES = Path(__file__).resolve().parent / "host"


def build_host(target: Path, sources: Path = SOURCES) -> None:
    """Compile and link the sources of one directory; raises CompilerMissing where the package has to do without."""
    try:
        import pybind11
    except ImportError as problem:
        raise CompilerMissing("pybind11 cannot be imported while building; pip install pybind11") from problem
    compiler = host_compiler()
    say(f"host extension {target.parent.name}.{target.name.split('.')[0]} with {compiler}")
    includes = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"), f"-I{sources}")
    flags = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-pthread")
    units = [Unit(source, (compiler, *flags, *includes)) for source in sorted(sources.glob("*.cpp"))]
    if not units:
        say(f"{sources} holds no sources yet")
        return
    link((compiler, "-pthread"), compile_all(units), target)
