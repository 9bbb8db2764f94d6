"""The thread that runs the engine, and its queues to and from the event loop.

The event loop never waits for the model and the model never waits for a client: requests go in through a bounded
queue, texts come out as callbacks on the loop. A request that finds the queue full, or waits in it too long, is refused
with a reason.
"""

from __future__ import annotations

import asyncio
import logging
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

_LOG = logging.getLogger("uvicorn.error")  # whose lines are bounded


class RequestRefused(MegatronRetroError):
    """A well-formed request that cannot be served now."""

    def __init__(self, what: str, status: int, fix: str | None = None) -> None:
        self.status = status
        super().__init__(what, fix=fix)


@dataclass(eq=False)
class RequestHandle:
    """A request in the queue or the engine. `texts` receives new text, and None at the end."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    texts: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)
    asked_at: float = field(default_factory=time.monotonic)
    generation: Generation | None = None
    waiting: bool = True
    failure: MegatronRetroError | None = None
    cancelled: bool = False

    def send(self, text: str | None) -> None:
        """Hand new text to the event loop; called by the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.texts.put_nowait, text)
        except RuntimeError:
            self.cancelled = True  # the loop is closed: nobody listens any more

    async def read(self) -> AsyncIterator[str]:
        """New texts until the end; raises the failure, if there was one."""
        while (text := await self.texts.get()) is not None:
            yield text
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
        """`on_loss` is called when the model's other processes are lost, after which nothing can be served."""
        self._engine, self._metrics, self._on_loss = engine, metrics, on_loss
        self._queue_size, self._queue_seconds = queue_size, queue_seconds
        self._arrived: deque[RequestHandle] = deque()
        self._open: list[RequestHandle] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failures = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the current step; open requests fail with "shutting down"."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait for the thread to end."""
        self.stop()
        self._thread.join(timeout=30)

    @property
    def num_waiting(self) -> int:
        """Requests without a place in the batch."""
        return len(self._arrived) + sum(handle.waiting for handle in list(self._open))

    @property
    def num_active(self) -> int:
        """Requests in the batch."""
        return sum(not handle.waiting for handle in list(self._open))

    def submit(self, requests: Sequence[GenerationRequest], loop: asyncio.AbstractEventLoop) -> list[RequestHandle]:
        """Queue the texts of one client, all of them or none. RequestRefused when the queue is full."""
        for request in requests:
            check_request(request, self._engine.limits, self._engine.forward)
        with self._changed:
            if self._closed:
                raise RequestRefused("the service is shutting down", 503)
            if self.num_waiting + len(requests) > self._queue_size:
                self._metrics.count("megatron_retro_refused_total", reason="queue full")
                raise RequestRefused(
                    f"the queue is full: {self.num_waiting} of {self._queue_size}", 429, "try again later"
                )
            handles = [RequestHandle(request, loop) for request in requests]
            self._arrived.extend(handles)
            self._changed.notify()
        return handles

    def cancel(self, handle: RequestHandle) -> None:
        """Cancel a request whose client has disconnected."""
        handle.cancelled = True
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
                self._end_all(RequestRefused("the service is shutting down", 503))
                return
            for handle in arrived:
                self._begin(handle)
            try:
                self._review()
                self._engine.step()
            except DistributedError as error:
                self.failures += 1
                self._end_all(RequestRefused("the model's other processes are gone", 503))
                if self._on_loss is not None:
                    self._on_loss(error)
            except MegatronRetroError as error:
                self._end_all(error)
            except Exception as error:  # a fault of ours must not stop the service for others
                self.failures += 1
                say(traceback.format_exc())
                self._end_all(RequestRefused(f"the engine failed: {type(error).__name__}", 500))
            self._review()

    def _begin(self, handle: RequestHandle) -> None:
        def forward(text: str) -> None:
            if text:
                handle.send(text)

        try:
            handle.generation = self._engine.submit(handle.request, forward)
        except MegatronRetroError as error:
            self._end(handle, error)

    def _review(self) -> None:
        """Update the metrics, and end the requests that are finished, cancelled or queued for too long."""
        now = time.monotonic()
        for handle in list(self._open):
            generation = handle.generation
            if generation is None:
                continue
            if handle.waiting and generation.started:
                handle.waiting = False
                self._metrics.observe("megatron_retro_waiting_seconds", now - handle.asked_at)
            if handle.cancelled and not generation.finished:
                self._engine.cancel(generation)
                self._metrics.count("megatron_retro_cancelled_total")
                _LOG.warning("a client left: %d tokens were written for it", len(generation.new_tokens))
            if handle.waiting and not generation.finished and now - handle.asked_at > self._queue_seconds:
                self._engine.cancel(generation)
                self._metrics.count("megatron_retro_refused_total", reason="waited too long")
                self._end(handle, RequestRefused(f"no place within {self._queue_seconds:g} s", 503, "try again later"))
            elif generation.finished:
                self._metrics.count("megatron_retro_generated_tokens_total", len(generation.new_tokens))
                self._metrics.count("megatron_retro_prompt_tokens_total", len(generation.request.prompt))
                self._metrics.observe("megatron_retro_request_seconds", now - handle.asked_at)
                self._attend(generation)
                failed = generation.failure
                self._end(handle, None if failed is None else RequestRefused(str(failed), 500))

    def _attend(self, generation: Generation) -> None:
        try:
            self._engine.attend(generation)
        except Exception:  # the text is whole, and is not lost by what is shown beside it
            self.failures += 1
            say(traceback.format_exc())

    def _end(self, handle: RequestHandle, failure: MegatronRetroError | None) -> None:
        handle.failure = failure
        if handle in self._open:
            self._open.remove(handle)
        handle.send(None)

    def _end_all(self, failure: MegatronRetroError) -> None:
        for handle in list(self._open):
            if handle.generation is not None:
                self._engine.cancel(handle.generation)
            self._end(handle, failure)
        self._engine.reset()
