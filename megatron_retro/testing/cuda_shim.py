"""The CUDA sources of csrc, compiled for the host: what tests run where there is no GPU."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.ops import registrations
from megatron_retro.ops.precision import Formula, comparisons

CSRC_VARIABLE = "MEGATRON_RETRO_SHIM_CSRC"  # a copy of csrc, with a planted fault
COUNTING_VARIABLE = "MEGATRON_RETRO_SHIM_COUNTING"  # a folder: the shim is built there, and counts its lines' runs
CSRC = Path(os.environ.get(CSRC_VARIABLE, Path(__file__).parents[2] / "csrc"))
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def excess_over_twice(ours: Formula, plain: Formula, inputs: Sequence[Tensor | None]) -> list[float]:
    """Per output and gradient, our largest error less what is allowed, in units of the result's rounding."""
    return [each.excess for each in comparisons(ours, plain, inputs)]


@dataclass(frozen=True)
class Kernels:
    """The operators and where their tensors live."""

    ops: Any
    device: str

    def excess(self, ours: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor | None) -> float:
        """Our largest error less twice the plain formula's, in units of the result's rounding."""
        moved = [
            each if each is None else each.detach().to(self.device).requires_grad_(each.requires_grad)
            for each in inputs
        ]
        return max(excess_over_twice(ours, plain, moved), default=0.0)


@dataclass(frozen=True)
class Shim:
    """csrc/operators/cuda/*.cu for the host: the operators, and every kernel in the library by its place there."""

    ops: Any
    library: ctypes.CDLL
    compiled: Mapping[int, str]

    def launched(self) -> set[str]:
        """The kernels that have run in this process."""
        places = (ctypes.c_uint64 * 1000)()
        count = self.library.shim_launched(places, ctypes.c_uint64(len(places)))
        assert count <= len(places)
        return {self.compiled[place] for place in places[:count]}


def declared_kernels() -> set[str]:
    """The name after every `__global__` of the sources."""
    text = "".join(path.read_text() for path in sorted((CSRC / "operators").rglob("*.cu*")))
    found = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)
    assert len(found) == text.count("__global__")
    return set(found)


def compiled_kernels(library: Path) -> dict[int, str]:
    """Place and name, template arguments included, of every kernel that the compiler made."""
    listing = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    names = "|".join(sorted(declared_kernels()))
    place = r"^([0-9a-f]+) \w (?:void )?megatron_retro::device::\(anonymous namespace\)"
    pattern = rf"{place}::((?:{names})\b(?!.*lambda).*)$"
    return {int(place, 16): name for place, name in re.findall(pattern, listing, re.MULTILINE)}


def load_shim() -> Shim:
    """Build the shim, unless its sources are as they were, and load it."""
    sys.path.insert(0, str(CSRC))
    try:
        from build_operators import build_shim  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(CSRC))
    folder = os.environ.get(COUNTING_VARIABLE)
    target = Path(folder or CSRC.parent / "build" / "csrc") / f"_shim.{os.getpid()}.so"
    build_shim(target, counting=folder is not None)
    torch.ops.load_library(str(target))  # type: ignore[no-untyped-call]
    found = Shim(torch.ops.megatron_retro_shim, ctypes.CDLL(str(target)), compiled_kernels(target))
    target.unlink()
    registrations.register("megatron_retro_shim")
    return found
