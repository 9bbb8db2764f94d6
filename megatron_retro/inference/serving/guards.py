"""Checks before the application: host name, API key and its share, size of a request, clients that do not read.

Plain ASGI, because a middleware of the framework would buffer streams.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from ipaddress import ip_address
from typing import Any

from starlette.exceptions import HTTPException

from megatron_retro.config.inference import ServeConfig
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

    def __init__(self, application: Application, config: ServeConfig, api_keys: Sequence[str] = ()) -> None:
        """Without keys everyone may enter."""
        self._application = application
        self._max_body_bytes, self._send_seconds = config.max_body_bytes, config.send_seconds
        self._hosts = _allowed_hosts(config)
        self._api_keys = [key.encode() for key in api_keys]
        self._requests_of_key, self._open_of_key = config.requests_per_key, Counter[int]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request, then pass it to the application."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if not self._is_called_here(headers.get(b"host", b"")):
            await _answer(send, 421, "the Host of the request is not one of --allowed-hosts", "wrong_host")
            return
        key = self._key_of(scope["path"], headers)
        if key is None:
            await _answer(send, 401, "the API key is missing or wrong", "invalid_api_key")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            await _answer(send, 413, f"the request is larger than {self._max_body_bytes} bytes", "request_too_large")
            return
        if key >= 0 and self._requests_of_key is not None and self._open_of_key[key] >= self._requests_of_key:
            await _answer(send, 429, f"{self._requests_of_key} requests of this key are open", "rate_limit_exceeded")
            return
        self._open_of_key[key] += 1
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self._open_of_key[key] -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
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

    def _is_called_here(self, host: bytes) -> bool:
        """A page elsewhere whose name was bound to this address (DNS rebinding) still sends that name."""
        name = host.decode("latin-1").lower()
        name = name.partition("]")[0].lstrip("[") if name.startswith("[") else name.partition(":")[0]
        return not name or "*" in self._hosts or name in self._hosts or _is_address(name)

    def _key_of(self, path: str, headers: dict[bytes, bytes]) -> int | None:
        """The number of the key that a client has; -1 where none is asked for, None for those who may not enter."""
        if not self._api_keys or path in OPEN_PATHS:
            return -1
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        same = [hmac.compare_digest(key.strip(), one) for one in self._api_keys]  # all of them: time tells nothing
        return same.index(True) if scheme.lower() == b"bearer" and any(same) else None

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


def _allowed_hosts(config: ServeConfig) -> set[str]:
    return {
        name.lower().rstrip(".")
        for name in ("localhost", socket.gethostname(), config.host, *(config.allowed_hosts or ()))
    }


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


async def _answer(send: Send, status: int, message: str, code: str) -> None:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json_text({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *_HEADERS]
    headers += [(b"retry-after", b"1")] if status == 429 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
