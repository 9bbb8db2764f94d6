"""Connections before a request is there: how many, how long, and how much they may write to the log."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_retro.config.inference import ServeConfig
from megatron_retro.errors import ConfigError

BACKLOG = 128  # connections that the system keeps until they are accepted
_FILES_BESIDE = 64  # open files of the model, the index and the libraries
_LOGGERS = ("uvicorn.error", "asyncio")


class BoundedConnection(H11Protocol):
    """A connection of a client, who has a while to send a request in whole, and makes room when there are too many.

    uvicorn's `limit_concurrency` would answer 503 to all, `/health` too, for as long as slow clients stay. Here a new
    client takes the place of the one that has been sending its request for the longest.
    """

    max_connections: int
    receive_seconds: float
    _deadline: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        """Make room for it, and begin to wait for its first request."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._longest_waiting().drop()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what came, and look whether the request is whole."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._forget_deadline()
        super().connection_lost(exc)

    @property
    def answering(self) -> bool:
        """Whether a whole request is here whose response is not written yet."""
        return not (
            self._receiving or self.cycle is None or self.cycle.response_complete or self.transport.is_closing()
        )

    def drop(self) -> None:
        """Close at once, whatever the client has not taken."""
        self.connections.discard(self)
        self.transport.abort()

    @property
    def _receiving(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _longest_waiting(self) -> BoundedConnection:
        known = [one for one in self.connections if isinstance(one, BoundedConnection)]
        return min((one for one in known if not one.answering and one is not self), key=_waits_since, default=self)

    def _watch(self) -> None:
        if not self._receiving or self.transport.is_closing():
            self._forget_deadline()
        elif self._deadline is None:
            self._since = self.loop.time()
            self._deadline = self.loop.call_later(self.receive_seconds, self.drop)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _waits_since(connection: BoundedConnection) -> float:
    return connection._since


def bounded_connection(config: ServeConfig) -> type[BoundedConnection]:
    """The kind of connection that a server makes of each client."""
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = open_files - BACKLOG - _FILES_BESIDE
    if config.max_connections > room and open_files != resource.RLIM_INFINITY:
        raise ConfigError(
            f"{config.max_connections} connections need more open files than this process may have",
            got=f"--max-connections {config.max_connections}, {open_files} open files",
            expected=f"at most {max(room, 0)} connections",
            fix="give a smaller --max-connections, or raise the limit with `ulimit -n`",
        )
    bounds = {"max_connections": config.max_connections, "receive_seconds": config.receive_seconds}
    return type("ServedConnection", (BoundedConnection,), bounds)


class FewLines(logging.Filter):
    """Lets so many lines into a log each minute; the next one says that others are left out."""

    def __init__(self, lines_each_minute: int) -> None:
        super().__init__()
        self._allowed, self._begun, self._seen = lines_each_minute, 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is logged."""
        now = time.monotonic()
        if self._seen == 0 or now - self._begun > 60.0:
            self._begun, self._seen = now, 0
        self._seen += 1
        if self._seen == self._allowed + 1:
            record.msg, record.args = f"more than {self._allowed} lines in a minute: others are left out", ()
            record.exc_info = record.exc_text = None
        return self._seen <= self._allowed + 1


@contextmanager
def few_log_lines(lines_each_minute: int = 60) -> Iterator[None]:
    """Bound what clients make the server and the event loop log."""
    bound = FewLines(lines_each_minute)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(bound)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(bound)
