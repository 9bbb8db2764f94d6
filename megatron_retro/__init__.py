"""Megatron-style training of language models that retrieve (RETRO, InstructRetro).

`load`, `Index`, `Corpus`, `NeighborTable` and `run` are the face for Python (docs/python.md); importing the package
loads nothing, the first use of one of them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_retro.api import Answer, Corpus, Index, Model, NeighborTable, Passage, load, run

__version__ = "0.1.0"
__all__ = ["Answer", "Corpus", "Index", "Model", "NeighborTable", "Passage", "load", "run"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_retro import api

    return getattr(api, name)
