"""Requests to stop that arrive from outside: SIGTERM, SIGUSR1 (SLURM's `--signal`), SIGINT, and a time limit.

A handler only notes the request; the loop asks between steps, so a step is never torn.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequests:
    """Collects reasons to stop; `reason()` is None while there is none."""

    def __init__(self, time_limit_seconds: float | None = None) -> None:
        self._deadline = None if time_limit_seconds is None else time.monotonic() + time_limit_seconds
        self._limit = time_limit_seconds
        self._signal: int | None = None

    def reason(self) -> str | None:
        """Why this process should save and stop, in words."""
        if self._signal is not None:
            return f"{signal.Signals(self._signal).name} arrived"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"the time limit of {(self._limit or 0) / 60:g} minutes is over"
        return None

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Remember a signal; installed as its handler."""
        self._signal = number

    @contextmanager
    def listening(self, numbers: tuple[signal.Signals, ...] = STOP_SIGNALS) -> Iterator[StopRequests]:
        """Take the signals over while the block runs, and give them back."""
        previous: dict[signal.Signals, _Handler] = {number: signal.signal(number, self.note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
