"""The engine's own thread, and how requests of an event loop reach it and text comes back.

The event loop never waits for the model and the model never waits for a client: requests go in through a bounded
queue, pieces of text come out as callbacks on the loop. A request that finds the queue full, or waits in it too
long, is refused with a reason.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from megatron_retro.errors import DistributedError, MegatronRetroError
from megatron_retro.inference.engine import Engine, check_request
from megatron_retro.inference.generation import Generation, GenerationRequest
from megatron_retro.inference.serving.metrics import Metrics
from megatron_retro.runtime.console import say


class Refused(MegatronRetroError):
    """A request that is well-formed and cannot be served now."""

    def __init__(self, what: str, status: int, fix: str | None = None) -> None:
        self.status = status
        super().__init__(what, fix=fix)


@dataclass(eq=False)
class Ticket:
    """One request on its way. `pieces` gets text, and None at the end."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)
    asked_at: float = field(default_factory=time.monotonic)
    generation: Generation | None = None
    waiting: bool = True
    failure: MegatronRetroError | None = None
    cancelled: bool = False

    def tell(self, piece: str | None) -> None:
        """Hand a piece to the event loop; from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:
            self.cancelled = True  # the loop is closed: nobody listens any more

    async def read(self) -> AsyncIterator[str]:
        """Pieces of text until the end; raises why it failed."""
        while (piece := await self.pieces.get()) is not None:
            yield piece
        if self.failure is not None:
            raise self.failure


class EngineThread:
    """Runs an engine until it is closed."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        queue_size: int,
        queue_seconds: float,
        on_loss: Callable[[DistributedError], None] | None = None,
    ) -> None:
        """`on_loss` hears that the model's other processes are gone, after which nothing can be served."""
        self._engine, self._metrics, self._on_loss = engine, metrics, on_loss
        self._queue_size, self._queue_seconds = queue_size, queue_seconds
        self._arrived: deque[Ticket] = deque()
        self._open: list[Ticket] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failures = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current step: open requests hear that the service is shutting down."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait for it."""
        self.stop()
        self._thread.join(timeout=30)

    @property
    def num_waiting(self) -> int:
        """Requests without a place in the batch."""
        return len(self._arrived) + sum(ticket.waiting for ticket in list(self._open))

    @property
    def num_active(self) -> int:
        """Requests in the batch."""
        return sum(not ticket.waiting for ticket in list(self._open))

    def submit(self, requests: Sequence[GenerationRequest], loop: asyncio.AbstractEventLoop) -> list[Ticket]:
        """Queue the texts of one client, all or none. Refused when the queue is full."""
        for request in requests:
            check_request(request, self._engine.limits, self._engine.forward)
        with self._changed:
            if self._closed:
                raise Refused("the service is shutting down", 503)
            if self.num_waiting + len(requests) > self._queue_size:
                self._metrics.count("megatron_retro_refused_total", reason="queue full")
                raise Refused(f"the queue is full: {self.num_waiting} of {self._queue_size}", 429, "try again later")
            tickets = [Ticket(request, loop) for request in requests]
            self._arrived.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """The client is gone."""
        ticket.cancelled = True
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._arrived or self._open, timeout=5.0)
                arrived, self._arrived = list(self._arrived), deque()
                self._open += arrived
                closed = self._closed
            if closed:
                self._end_all(Refused("the service is shutting down", 503))
                return
            for ticket in arrived:
                self._begin(ticket)
            try:
                self._review()
                self._engine.step()
            except DistributedError as error:
                self.failures += 1
                self._end_all(Refused("the model's other processes are gone", 503))
                if self._on_loss is not None:
                    self._on_loss(error)
            except MegatronRetroError as error:
                self._end_all(error)
            except Exception as error:  # a fault of ours must not stop the service for others
                self.failures += 1
                say(traceback.format_exc())
                self._end_all(Refused(f"the engine failed: {type(error).__name__}", 500))
            self._review()

    def _begin(self, ticket: Ticket) -> None:
        def hear(piece: str) -> None:
            if piece:
                ticket.tell(piece)

        try:
            ticket.generation = self._engine.submit(ticket.request, hear)
        except MegatronRetroError as error:
            self._end(ticket, error)

    def _review(self) -> None:
        """Note who started, who is done, who left and who waited too long."""
        now = time.monotonic()
        for ticket in list(self._open):
            generation = ticket.generation
            if generation is None:
                continue
            if ticket.waiting and generation.started:
                ticket.waiting = False
                self._metrics.observe("megatron_retro_waiting_seconds", now - ticket.asked_at)
            if ticket.cancelled and not generation.finished:
                self._engine.cancel(generation)
                self._metrics.count("megatron_retro_cancelled_total")
            if ticket.waiting and not generation.finished and now - ticket.asked_at > self._queue_seconds:
                self._engine.cancel(generation)
                self._metrics.count("megatron_retro_refused_total", reason="waited too long")
                self._end(ticket, Refused(f"no place within {self._queue_seconds:g} s", 503, "try again later"))
            elif generation.finished:
                self._metrics.count("megatron_retro_generated_tokens_total", len(generation.new_tokens))
                self._metrics.count("megatron_retro_prompt_tokens_total", len(generation.request.prompt))
                self._metrics.observe("megatron_retro_request_seconds", now - ticket.asked_at)
                failed = generation.failure
                self._end(ticket, None if failed is None else Refused(str(failed), 500))

    def _end(self, ticket: Ticket, failure: MegatronRetroError | None) -> None:
        ticket.failure = failure
        if ticket in self._open:
            self._open.remove(ticket)
        ticket.tell(None)

    def _end_all(self, failure: MegatronRetroError) -> None:
        for ticket in list(self._open):
            if ticket.generation is not None:
                self._engine.cancel(ticket.generation)
            self._end(ticket, failure)
        self._engine.reset()
