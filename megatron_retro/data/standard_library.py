"""Text that every machine has: the sources and the language reference of Python's own standard library.

It repeats itself as program text does (codecs, headers, families of modules), which is what retrieval feeds on, and it
is here without a download. One document per file; whole files are held out, chosen by a hash of their name.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
)


@dataclass(frozen=True)
class Document:
    """A name and its text."""

    name: str
    text: str

    def is_held_out(self, share: float) -> bool:
        """Whether this document is among the held-out `share`."""
        number = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        return number < share * 2**64


def standard_library_documents() -> Iterator[Document]:
    """Sources in the order of their names, then the reference's topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            text = _readable(path)
            if text:
                yield Document("/".join(parts), text)
    yield from _reference_topics()


def _readable(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _reference_topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Document(f"topic {name}", text)
