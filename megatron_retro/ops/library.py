"""The compiled operators of `csrc/operators`: loading them once, and saying why where that cannot be.

Calling `torch.ops.megatron_retro.NAME` is for the faces of this package, after `problem()` returned None.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_name("_operators.so")
BUILD = "python setup.py build_ext --inplace, or pip install again with a C++ compiler at hand"
# Operators without a CUDA side, on purpose; a test holds every other one to both.
CPU_ONLY = frozenset({"few_row_linear"})


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
    from megatron_retro.ops import registrations

    registrations.register()
    return None


def has_cuda_kernels() -> bool:
    """Whether the loaded library was compiled with nvcc."""
    return problem() is None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "megatron_retro::gated_activation", "CUDA"
    )
