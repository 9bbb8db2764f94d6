"""Pickles of other programs, read without running anything of them.

Python's own unpickler asks for every name that a pickle uses, so what it may build is the reader's choice. Where a
pickle keeps a value is a number in the file, and the unpickler's memory grows with that number: one beyond the file's
length is refused first.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any


def no_name(module: str, name: str) -> Any:
    """Numbers, texts and containers need no name."""
    raise ValueError(f"a name that plain values have no use for: {module}.{name}")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, find: Callable[[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._find = find

    def find_class(self, module: str, name: str) -> Any:
        return self._find(module, name)


def read_pickle(data: bytes, find: Callable[[str, str], Any] = no_name) -> Any:
    """What a pickle holds; `find(module, name)` gives what stands for a name, or raises."""
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(data):
            raise ValueError("a pickle that keeps a value beyond its own end")
    return _Unpickler(data, find).load()
