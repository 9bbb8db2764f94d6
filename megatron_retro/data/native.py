"""The compiled half of this package (`csrc/host`), or the word that it is missing and NumPy does its work."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

from megatron_retro.runtime.console import warn


@functools.cache
def extension() -> ModuleType | None:
    """`_native`, or None after saying so once. MEGATRON_RETRO_NATIVE=0 asks for None."""
    if os.environ.get("MEGATRON_RETRO_NATIVE", "1") == "0":
        return None
    try:
        return importlib.import_module("megatron_retro.data._native")
    except ImportError as error:
        warn(
            f"the compiled data functions are missing ({error}): NumPy and the plain tokenizers work instead, slower.\n"
            "Build them with: pip install -e . --no-build-isolation (needs a C++ compiler)"
        )
        return None
