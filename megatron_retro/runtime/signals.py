"""Requests to stop that arrive from outside: SIGTERM, SIGUSR1 (SLURM's `--signal`), SIGINT, and a time limit.

A handler only notes the request; the loop asks between steps, so a step is never torn. What came before a handler
stood, a launcher has kept in a file (`runtime.endings`).
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from megatron_retro.errors import Requeue
from megatron_retro.runtime.endings import early_stop

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LIBRARY = ctypes.CDLL(None, use_errno=True)
Block = TypeVar("Block")
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
    def listening(
        self,
        numbers: tuple[signal.Signals, ...] = STOP_SIGNALS,
        note: Callable[[int, FrameType | None], object] | None = None,
    ) -> Iterator[StopRequests]:
        """Take the signals over while the block runs, and give them back; beside the main thread none arrive."""
        handler = note or self.note
        if threading.current_thread() is not threading.main_thread():
            numbers = ()
        previous: dict[signal.Signals, _Handler] = {number: signal.signal(number, handler) for number in numbers}
        if self._signal is None:
            self._signal = early_stop()
        try:
            yield self
        finally:
            for number, former in previous.items():
                signal.signal(number, former if former is not None else signal.SIG_DFL)


def until_stopped(blocks: Iterator[Block]) -> Iterator[Block]:
    """The blocks, until a signal asks to stop: the one in work is finished, then `Requeue` is raised.

    Whoever waits for the next block leaves at once.
    """
    stops, at_work = StopRequests(), False

    def note(number: int, frame: FrameType | None) -> None:
        stops.note(number)
        if not at_work:
            raise stopped_between_blocks(stops)

    with stops.listening(note=note):
        for block in blocks:
            at_work = True
            yield block
            at_work = False
            if stops.reason() is not None:
                raise stopped_between_blocks(stops)


def stopped_between_blocks(stops: StopRequests) -> Requeue:
    """The request to start again what has finished whole blocks."""
    return Requeue(
        f"stopped early: {stops.reason()}; finished blocks are kept", fix="run the same command again to go on"
    )


def die_with_parent() -> None:
    """Linux: be killed when the parent is, so that no worker goes on alone."""
    if hasattr(_LIBRARY, "prctl"):
        _LIBRARY.prctl(1, signal.SIGKILL)
