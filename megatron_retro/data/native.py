"""The compiled half of this package (`csrc/host`); where it is missing, NumPy does its work."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from megatron_retro.errors import DamagedArtifact
from megatron_retro.runtime.console import warn

REMEDY = "`megatron-retro inspect` says what is damaged; write the token file, or create the database, again"


@functools.cache
def extension() -> ModuleType | None:
    """`_native`, or None after saying so once. MEGATRON_RETRO_NATIVE=0 asks for None."""
    if os.environ.get("MEGATRON_RETRO_NATIVE", "1") == "0":
        return None
    try:
        return importlib.import_module("megatron_retro.data._native")
    except ImportError as error:
        warn(
            f"the compiled data functions are missing ({error}): NumPy works instead, slower.\n"
            "Build them with: pip install -e . --no-build-isolation (needs a C++ compiler)"
        )
        return None


@contextmanager
def named_damage() -> Iterator[None]:
    """Turn the extension's error about a number that leads outside its file into one that says what to do."""
    native = extension()
    try:
        yield
    except getattr(native, "DamagedFile", ()) as damage:
        raise DamagedArtifact(str(damage), fix=REMEDY) from None
