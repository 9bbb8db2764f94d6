"""Ends a process that is alone and reads for too long, with a sentence.

Ranks of a job watch each other (`heartbeat.py`). A process that is alone has nobody who waits for it: where the disk or
the file server does not answer, the read never returns, and no signal reaches Python.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_retro.errors import LostRank
from megatron_retro.runtime.console import show_error
from megatron_retro.runtime.endings import write_ending


def end_process(error: LostRank) -> None:
    """Say why, and leave at once: the thread that hangs cannot be asked."""
    show_error(error)
    write_ending(error.exit_code, str(error))
    sys.stderr.flush()
    os._exit(error.exit_code)


class Standstill:
    """Watches reads from a thread of its own."""

    def __init__(self, seconds: float, where: str, end: Callable[[LostRank], None] = end_process) -> None:
        self._seconds, self._where, self._end = seconds, where, end
        self._read: tuple[float, str] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="standstill", daemon=True)
        self._thread.start()

    @contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """Reading `what` may take so long and no longer."""
        self._read = (time.monotonic(), what)
        try:
            yield
        finally:
            self._read = None

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 4)):
            read = self._read
            if read is not None and time.monotonic() - read[0] > self._seconds:
                self._end(
                    LostRank(
                        f"the loader hangs: {read[1]} did not come",
                        got=f"nothing for {self._seconds:g} s (--distributed-timeout-minutes)",
                        fix=f"look at the disk or the file server of {self._where}; the same command goes on from the "
                        "newest checkpoint",
                    )
                )
                return

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()
        self._thread.join()
