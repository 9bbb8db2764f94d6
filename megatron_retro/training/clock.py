"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the seconds of named phases; what is in none of them is `other`. `note` hears which one begins."""

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._note = note
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under a name."""
        if self._note is not None:
            self._note(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap."""
        now = time.perf_counter()
        seconds, self._seconds = self._seconds, {}
        seconds["other"] = max(0.0, now - self._start - sum(seconds.values()))
        self._start = now
        return seconds
