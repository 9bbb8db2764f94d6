"""Where the time of a step goes: into its phases, and into waiting for other ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed import Work


@dataclass(frozen=True)
class Lap:
    """Seconds of each phase, and how many of them all together this rank waited for others."""

    seconds: Mapping[str, float]
    waiting: float


class Clock:
    """Adds up the seconds of named phases; what is in none of them is `other`. `note` hears which one begins."""

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._waiting = 0.0
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

    @contextmanager
    def counting_waits(self) -> Iterator[None]:
        """Count the time that this thread waits in collectives while the block runs.

        Every collective on the CPU ends in `Work.wait`: our own, those of torch's schedules, and those of FSDP2. On a
        GPU that call only puts the wait into the device's queue, so waiting is not seen there.
        """
        wait, thread = Work.wait, threading.get_ident()

        def counted(work: Work, *arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(work, *arguments)
            finally:
                if threading.get_ident() == thread:  # a save in the background waits for its own
                    self._waiting += time.perf_counter() - start

        Work.wait = counted  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Work.wait = wait  # type: ignore[method-assign]

    def lap(self) -> Lap:
        """What was counted since the last lap."""
        now = time.perf_counter()
        seconds, self._seconds = self._seconds, {}
        waiting, self._waiting = self._waiting, 0.0
        seconds["other"] = max(0.0, now - self._start - sum(seconds.values()))
        self._start = now
        return Lap(seconds, waiting)
