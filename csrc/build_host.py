"""Builds host-side C++ bound by pybind11: `data._native` from `host/`, `retrieval._native` from `host/retrieval/`."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from build_toolchain import CompilerMissing, Unit, compile_all, host_compiler, link, say

SOURCES = Path(__file__).resolve().parent / "host"


SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")


def build_host(target: Path, sources: Path = SOURCES, more_flags: Sequence[str] = ()) -> None:
    """Compile and link the sources of one directory; raises CompilerMissing where the package has to do without.

    `more_flags` come last: `SANITIZED` gives a library that stops at the first wrong access.
    """
    try:
        import pybind11
    except ImportError as problem:
        raise CompilerMissing("pybind11 cannot be imported while building; pip install pybind11") from problem
    compiler = host_compiler()
    say(f"host extension {target.parent.name}.{target.name.split('.')[0]} with {compiler}")
    includes = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"), f"-I{sources}")
    flags = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-pthread", *more_flags)
    units = [Unit(source, (compiler, *flags, *includes)) for source in sorted(sources.glob("*.cpp"))]
    if not units:
        say(f"{sources} holds no sources yet")
        return
    link((compiler, "-pthread", *more_flags), compile_all(units), target)
