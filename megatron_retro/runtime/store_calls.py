"""Calls of the ranks' store that end, whatever becomes of the rank that keeps it.

torch's store has timeouts for values that are not there yet. A store whose process is stopped accepts questions and
never answers: each call waits for ever, and holds the lock on which every other call of that connection waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


class StoreCalls:
    """The calls of one connection. After one that was not answered all others fail at once, until it is."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._unanswered: threading.Thread | None = None

    def __call__(self, call: Callable[[], Answer]) -> Answer:
        """What `call` gives or raises; RuntimeError when it takes too long."""
        if self._unanswered is not None and self._unanswered.is_alive():
            raise RuntimeError("the store has not answered before")
        answers: list[Answer] = []
        faults: list[BaseException] = []

        def ask() -> None:
            try:
                answers.append(call())
            except BaseException as error:  # raised below, in the thread that asked
                faults.append(error)

        thread = threading.Thread(target=ask, name="store call", daemon=True)
        thread.start()
        thread.join(self._seconds)
        if thread.is_alive():
            self._unanswered = thread
            raise RuntimeError(f"timed out: no answer of the store in {self._seconds:g} s")
        if faults:
            raise faults[0]
        return answers[0]
