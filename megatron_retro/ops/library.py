"""The compiled operators of `csrc/operators`: loading them once, and saying why where that cannot be.

Calling `torch.ops.megatron_retro.NAME` is for the faces of this package, after `problem()` returned None.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from megatron_retro.ops import registrations

PATH = Path(__file__).with_name("_operators.so")
BUILD = "python setup.py build_ext --inplace, or pip install again with a C++ compiler at hand"
LIBTORCH_CUDA = "libtorch_cuda.so"
# Operators without a CUDA side, on purpose; a test holds every other one to both.
CPU_ONLY = frozenset({"small_batch_gemv"})


@cache
def problem() -> str | None:
    """Load the library and register what belongs to its operators; why it cannot be used, or None."""
    if not PATH.exists():
        return f"csrc is not compiled ({BUILD})"
    try:
        torch.ops.load_library(str(PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        cause = error.__cause__ or error
        return f"{PATH.name} does not load: {str(cause).splitlines()[0]} ({BUILD})"
    missing = [name for name in registrations.FAKES if not hasattr(torch.ops.megatron_retro, name)]
    if missing:
        return f"{PATH.name} is of other sources, it lacks {', '.join(missing)} ({BUILD})"
    registrations.register()
    return None


def compiled_architectures() -> tuple[str, ...]:
    """`("80", "90", "90+ptx")`: what nvcc made of the CUDA kernels; empty where there are none."""
    return _fact("megatron_retro_cuda_architectures") if problem() is None else ()


@cache
def cuda_problem() -> str | None:
    """Why the CUDA kernels cannot run on this process's GPU, or None where they can."""
    if problem() is not None:
        return problem()
    made = compiled_architectures()
    if not made:
        return "csrc was compiled without nvcc"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    built_with = cuda_version()
    if built_with.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"csrc was compiled with CUDA {built_with}, this torch with {torch.version.cuda} ({BUILD})"
    if lost := find_stream(LIBTORCH_CUDA):
        return f"torch's current stream is not found in {LIBTORCH_CUDA}: {lost}"
    if not torch.cuda.is_available():
        return "no NVIDIA driver or device"
    capability = torch.cuda.get_device_capability()
    if not runs_on(capability, made):
        return (
            f"csrc was compiled for {', '.join(made)}, this GPU is {capability[0]}{capability[1]}: build again with "
            f"MEGATRON_RETRO_CUDA_ARCHITECTURES={capability[0]}{capability[1]} ({BUILD})"
        )
    return None


def cuda_version() -> str:
    """The CUDA that the kernels were compiled with, as `13.0`."""
    return "".join(_fact("megatron_retro_cuda_version"))


def runs_on(capability: tuple[int, int], made: Sequence[str]) -> bool:
    """Whether a GPU runs one of these: machine code of its generation and not newer, or PTX of any older one."""
    for word in made:
        number = int(word.removesuffix("+ptx"))
        same_generation = divmod(number, 10)[0] == capability[0]
        if number <= 10 * capability[0] + capability[1] and (same_generation or word.endswith("+ptx")):
            return True
    return False


def _fact(name: str) -> tuple[str, ...]:
    function = getattr(ctypes.CDLL(str(PATH)), name, None)  # none in a library of an older source
    if function is None:
        return ()
    function.restype = ctypes.c_char_p
    return tuple(function().decode().split())


def find_stream(torch_library: str) -> str | None:
    """Let the library find torch's current stream; why it could not, or None."""
    function = ctypes.CDLL(str(PATH)).megatron_retro_find_stream
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    reason = function(torch_library.encode())
    return None if reason is None else reason.decode()
