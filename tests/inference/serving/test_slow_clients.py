"""Before a request is there: slow and many clients, foreign host names, keys, aborted requests."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_retro.config.inference import ServeConfig
from megatron_retro.errors import ConfigError
from megatron_retro.inference.serving.connections import FewLines, bounded_connection
from megatron_retro.inference.serving.guards import Guards
from megatron_retro.inference.serving.server import read_api_keys

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF_HEAD, HALF_BODY = HEAD + b"X-Slow: ", HEAD + b"Content-Length: 900\r\n\r\n{"


@contextmanager
def slow_clients(service: Any, number: int) -> Iterator[list[socket.socket]]:
    """Clients of which each sends nothing, half a head or half a body, and waits."""
    host, port = service.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        clients = []
        for one in range(number):
            client = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            client.sendall((b"", HALF_HEAD, HALF_BODY)[one % 3])
            clients.append(client)
        yield clients


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed a connection; waits for it."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def wait_until_nothing_runs(service: Any) -> None:
    deadline = time.monotonic() + 20
    while service.server.server_state.tasks and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not service.server.server_state.tasks


def test_slow_clients_are_closed_and_health_answers_while_they_hang(service_with: Callable[..., Any]) -> None:
    service = service_with(receive_seconds=4.0)
    with slow_clients(service, 200) as clients:
        assert all(httpx.get(service.url + "/health", timeout=10).status_code == 200 for _ in range(20))
        assert all(is_closed(client) for client in clients)
    wait_until_nothing_runs(service)


def test_more_slow_clients_than_connections_do_not_keep_others_out(service_with: Callable[..., Any]) -> None:
    """The newest client takes the place of the one that has been sending for the longest, long before the deadline."""
    service = service_with(receive_seconds=600.0, max_connections=20)
    with slow_clients(service, 200) as clients:
        assert all(httpx.get(service.url + "/health", timeout=10).status_code == 200 for _ in range(20))
        assert len(service.server.server_state.connections) <= 20
        assert all(is_closed(client) for client in clients[:180])


def p99_of_health(service: Any) -> float:
    """Seconds until `/health` answers, of 200 on connections of their own."""
    seconds = []
    for _ in range(200):
        begun = time.monotonic()
        assert httpx.get(service.url + "/health", timeout=30).status_code == 200
        seconds.append(time.monotonic() - begun)
    return sorted(seconds)[197]


@pytest.mark.full
@pytest.mark.parametrize("places", [256, 600], ids=["fewer places than clients", "a place for each"])
def test_500_slow_clients_do_not_hold_up_health(service_with: Callable[..., Any], record: Any, places: int) -> None:
    service = service_with(receive_seconds=600.0, max_connections=places)
    alone = p99_of_health(service)
    with slow_clients(service, 500):
        beside = p99_of_health(service)
        held = len(service.server.server_state.connections)
    facts = {"places": places, "held": held, "p99 of /health": round(beside, 3), "without them": round(alone, 3)}
    record(f"500 slow clients, {places} places", facts)
    assert held >= min(places, 500) - 1 and beside < alone + 1.0, facts


def test_a_byte_now_and_then_does_not_move_the_deadline(service_with: Callable[..., Any]) -> None:
    service = service_with(receive_seconds=1.0)
    for start in (HALF_HEAD, HALF_BODY):
        with slow_clients(service, 1) as (client,):
            begun = time.monotonic()
            with pytest.raises(OSError):
                client.sendall(start)
                while time.monotonic() - begun < 20:
                    client.sendall(b"x")
                    time.sleep(0.1)


def test_a_client_that_sends_in_pieces_is_answered_for_longer_than_it_may_send(
    service_with: Callable[..., Any],
) -> None:
    """The deadline is for the request; neither an answer nor a second request on the same connection is cut by it."""
    service = service_with(receive_seconds=1.0)
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for _ in range(2):
            time.sleep(0.7)
            answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 450, "n": 4})
            assert answer.status_code == 200


def test_aborted_requests_log_a_line_at_most(
    service_with: Callable[..., Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    service = service_with(receive_seconds=600.0)
    with caplog.at_level(logging.INFO), slow_clients(service, 30):
        pass
    assert httpx.get(service.url + "/health").status_code == 200
    wait_until_nothing_runs(service)
    written = "\n".join((caplog.text, *capfd.readouterr()))
    assert "Traceback" not in written
    assert len([line for line in written.splitlines() if line.strip()]) <= 2 * 30


def test_log_lines_are_bounded() -> None:
    bound, logger = FewLines(5), logging.Logger("asked")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addFilter(bound)
    logger.addHandler(handler)
    for _ in range(1000):
        logger.warning("Invalid %s request received.", "HTTP")
    assert lines == ["Invalid HTTP request received."] * 5 + ["more than 5 lines in a minute: others are left out"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8000", 200),
        (socket.gethostname(), 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[evil.example]", 421),
    ],
)
def test_foreign_host_names_are_refused(service: Any, host: str, status: int) -> None:
    """A page elsewhere that binds its own name to this address reads nothing."""
    answer = httpx.get(service.url + "/v1/models", headers={"Host": host})
    assert answer.status_code == status
    if status != 200:
        assert "--allowed-hosts" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("allowed", "status"), [("Model.lan", 200), ("*", 200), ("lan", 421)])
def test_names_that_are_allowed(service_with: Callable[..., Any], allowed: str, status: int) -> None:
    service = service_with(allowed_hosts=(allowed,))
    assert httpx.get(service.url + "/v1/models", headers={"Host": "model.lan:80"}).status_code == status


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n\n  second \n")
    assert read_api_keys(ServeConfig(api_key_file=str(file))) == ["first", "second"]
    assert read_api_keys(ServeConfig()) == []
    for content in ("", "\n \n", "schlüssel"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="no usable key"):
            read_api_keys(ServeConfig(api_key_file=str(file)))


def test_one_key_does_not_take_the_share_of_another(service_with: Callable[..., Any]) -> None:
    service = service_with(api_keys=["first", "second"], requests_per_key=1)

    def ask(key: str) -> httpx.Response:
        body = {"prompt": "x", "max_tokens": 2}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(service.url + "/v1/completions", json=body, headers=headers, timeout=60)

    def wait_for(key: str, status: int) -> httpx.Response:
        deadline = time.monotonic() + 20
        while (answer := ask(key)).status_code != status and time.monotonic() < deadline:
            time.sleep(0.02)
        assert answer.status_code == status
        return answer

    with slow_clients(service, 1) as (client,):
        client.sendall(HEAD + b"Authorization: Bearer first\r\nContent-Length: 900\r\n\r\n{")
        assert wait_for("first", 429).headers["retry-after"]
        assert ask("second").status_code == 200
        assert ask("third").status_code == 401
    wait_for("first", 200)


def test_more_connections_than_files_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 300))
    with pytest.raises(ConfigError, match="ulimit"):
        bounded_connection(ServeConfig(max_connections=200))
    assert bounded_connection(ServeConfig(max_connections=100)).max_connections == 100


def test_reader_that_takes_nothing_is_dropped() -> None:
    """The sender's side alone: a connection that never accepts a byte ends the request, and what feeds it."""
    ended: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        finally:
            ended.append("application")

    async def stuck(_: Any) -> None:
        await asyncio.sleep(60)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    guarded = Guards(application, ServeConfig(max_body_bytes=1024, send_seconds=0.1))
    scope = {"type": "http", "path": "/", "headers": []}
    started = time.monotonic()
    asyncio.run(guarded(scope, receive, stuck))
    assert ended == ["application"] and time.monotonic() - started < 5
