"""Compilers, and object files that are made again only when something they depend on changed.

What is built belongs elsewhere: `build_operators.py` (torch's stable ABI) and `build_host.py` (pybind11).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CACHE = ROOT.parent / "build" / "csrc"
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


class CompilerMissing(Exception):
    """No compiler: the package installs all the same and runs on its references in plain PyTorch."""


class CompilationFailed(Exception):
    """A compiler is there and refused our sources."""


@dataclass(frozen=True)
class Unit:
    """One source file compiled one way."""

    source: Path
    command: tuple[str, ...]
    label: str = ""

    @property
    def name(self) -> str:
        """What progress lines call it."""
        return f"{self.source.name} {self.label}".strip()


def switched_off(variable: str) -> bool:
    """Whether the user set an environment variable to 0, no, off or false."""
    return os.environ.get(variable, "1").lower() in ("0", "no", "off", "false")


def host_compiler() -> str:
    """The C++ compiler: $CXX, or the first of g++, clang++ and c++ on the path."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise CompilerMissing("no C++ compiler found ($CXX, g++, clang++, c++); on Debian: apt-get install g++")


def cuda_compiler() -> str | None:
    """nvcc from the path or from $CUDA_HOME; None where there is none or MEGATRON_RETRO_CUDA=0."""
    if switched_off("MEGATRON_RETRO_CUDA"):
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


def is_x86() -> bool:
    """Whether this is an x86-64 machine, where we compile for several instruction sets."""
    return platform.machine().lower() in ("x86_64", "amd64")


def compile_all(units: Sequence[Unit]) -> list[Path]:
    """The object files of `units`, in order; those that are up to date are taken from the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(_compiled, units))


def compile_into(folder: Path, units: Sequence[Unit]) -> list[Path]:
    """The same without the cache, for compilers that leave more than an object file."""

    def compiled(unit: Unit) -> Path:
        target = folder / f"{unit.source.stem}.o"
        run([*unit.command, "-c", str(unit.source), "-o", str(target)], unit.name)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(compiled, units))


def link(command: Sequence[str], objects: Sequence[Path], target: Path, libraries: Sequence[str] = ()) -> None:
    """A shared library from objects, moved into place only when complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    run([*command, "-shared", "-o", str(unfinished), *map(str, objects), *libraries], target.name)
    os.replace(unfinished, target)


def say(text: str) -> None:
    """A line about the build; pip shows it with -v or on failure."""
    print(f"csrc: {text}", file=sys.stderr, flush=True)


def _compiled(unit: Unit) -> Path:
    target = CACHE / f"{unit.source.stem}.{key_of(unit)}.o"
    if not target.exists():
        say(f"compiling {unit.name}")
        unfinished = target.with_suffix(f".{os.getpid()}.o")
        output = run([*unit.command, "-c", str(unit.source), "-o", str(unfinished)], unit.name)
        target.with_suffix(".log").write_text(output)
        os.replace(unfinished, target)
    return target


def key_of(unit: Unit) -> str:
    """Changes with the command, the compiler and everything of ours that it reads; another checkout's is the same."""
    key = hashlib.sha256()
    for part in (*unit.command, _compiler_version(unit.command[0])):
        key.update(part.replace(str(ROOT.parent), ".").encode() + b"\0")
    for path in read_files(unit):
        key.update(path.read_bytes() + b"\0")
    return key.hexdigest()[:20]


def run(command: Sequence[str], name: str) -> str:
    """What a compiler said; CompilationFailed with all of it where it failed."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    output = finished.stdout + finished.stderr
    if finished.returncode != 0:
        raise CompilationFailed(
            f"{name} does not compile\n  command: {' '.join(command)}\n{output}\n"
            "  fix: MEGATRON_RETRO_NATIVE=0 installs without compiled operators, MEGATRON_RETRO_CUDA=0 without CUDA"
        )
    return output


def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def read_files(unit: Unit) -> list[Path]:
    """The source and every header of ours that it includes, directly or not, where the unit's compiler looks for them.

    What stands behind a condition counts if the compiler could find it: the CUDA sources ask for the shim's headers,
    which only the shim's own build sees.
    """
    folders = [Path(word[2:]) for word in unit.command if word.startswith("-I")]
    found: dict[Path, None] = {unit.source: None}
    pending = [unit.source]
    while pending:
        includer = pending.pop()
        for name in _INCLUDE.findall(includer.read_text()):
            places = (folder / name for folder in (includer.parent, *folders))
            path = next((place.resolve() for place in places if place.is_file()), None)
            if path is not None and path not in found:
                found[path] = None
                pending.append(path)
    return list(found)
