"""Checks before the application: size of a request, API key, and clients that do not read.

Plain ASGI, because a middleware of the framework would buffer streams.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from megatron_retro.runtime.strict_json import json_text

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/page.js", "/page.css", "/favicon.ico")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'"),
]


class BodyTooLarge(HTTPException):
    """The client sent more than is allowed; the framework hands it to its error handler as it is."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the request is larger than {limit} bytes")


class Guards:
    """Wraps an application with its checks."""

    def __init__(
        self, application: Application, *, max_body_bytes: int, send_seconds: float, api_key: str | None
    ) -> None:
        self._application = application
        self._max_body_bytes, self._send_seconds = max_body_bytes, send_seconds
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request, then pass it to the application."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if not self._may_enter(scope["path"], headers):
            await _answer(send, 401, "the API key is missing or wrong", "invalid_api_key")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            await _answer(send, 413, f"the request is larger than {self._max_body_bytes} bytes", "request_too_large")
            return

        started = False

        async def guarded_send(event: Event) -> None:
            nonlocal started
            started = True
            if event["type"] == "http.response.start":
                event["headers"] = [*event.get("headers", ()), *_HEADERS]
            await asyncio.wait_for(send(event), self._send_seconds)

        try:
            await self._application(scope, self._counted(receive), guarded_send)
        except asyncio.TimeoutError:
            return  # the client does not read: the connection is dropped
        except asyncio.CancelledError:  # the service ends, and this request has not even come in whole
            if not started:
                await _answer(send, 503, "the service is shutting down", "shutting_down")

    def _may_enter(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._api_key is None or path in OPEN_PATHS:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._api_key)

    def _counted(self, receive: Receive) -> Receive:
        """Bodies without a length are counted while they come."""
        received = 0

        async def counted() -> Event:
            nonlocal received
            event = await receive()
            if event["type"] == "http.request":
                received += len(event.get("body", b""))
                if received > self._max_body_bytes:
                    raise BodyTooLarge(self._max_body_bytes)
            return event

        return counted


async def _answer(send: Send, status: int, message: str, code: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json_text({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
