"""Starts the service: engine thread, application, listening socket."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from megatron_retro.config.inference import ChatConfig, ServeConfig
from megatron_retro.errors import ConfigError, DistributedError, EnvironmentProblem
from megatron_retro.inference.chat_format import ChatFormat, load_chat_format
from megatron_retro.inference.serving import answering
from megatron_retro.inference.serving.application import build_application
from megatron_retro.inference.serving.connections import BACKLOG, bounded_connection, few_log_lines
from megatron_retro.inference.serving.engine_thread import EngineThread
from megatron_retro.inference.serving.guards import Guards
from megatron_retro.inference.serving.metrics import Metrics
from megatron_retro.inference.text_generator import TextGenerator
from megatron_retro.runtime.allocator import return_freed_blocks
from megatron_retro.runtime.console import say, warn
from megatron_retro.runtime.signals import StopRequests

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve_generator(generator: TextGenerator, checkpoint: Path, config: ServeConfig, chat: ChatConfig) -> None:
    """Answer requests until a signal comes."""
    return_freed_blocks()
    api_keys = read_api_keys(config)
    name = config.served_model_name or checkpoint.parent.name or "model"
    losses: list[DistributedError] = []

    def end(loss: DistributedError) -> None:
        losses.append(loss)
        server.should_exit = True

    chat_format = load_chat_format(checkpoint, chat.chat_template)
    server = build_service(generator, config, name, chat_format, api_keys, end)
    listener = listening_socket(config)
    if config.host not in _LOOPBACK and not api_keys:
        warn(f"anyone who reaches {config.host} can use this service: give --api-key-file")
    address, port = listener.getsockname()[:2]
    say(f"{name}: page and OpenAI-compatible API at http://{address}:{port}/ (Ctrl-C ends it)")
    # uvicorn sends itself what signals it has caught
    with StopRequests().listening((signal.SIGTERM, signal.SIGINT)), few_log_lines():
        server.run(sockets=[listener])
    if losses:
        raise losses[0]


class Server(uvicorn.Server):
    """When it is told to end, lets texts finish for a while, and then tells the clients of the others why they end."""

    def __init__(
        self, application: Guards, thread: EngineThread, config: ServeConfig, finishing_seconds: float
    ) -> None:
        settings = uvicorn.Config(
            application,
            http=bounded_connection(config),
            ws="none",
            backlog=BACKLOG,
            log_level="warning",
            timeout_graceful_shutdown=math.ceil(finishing_seconds) + 2,
            timeout_keep_alive=15,
            server_header=False,
        )
        super().__init__(settings)
        self._engine_thread, self._finishing_seconds = thread, finishing_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn when it ends; connections that are open after the engine's end are closed."""
        ending = asyncio.get_running_loop().call_later(self._finishing_seconds, self._engine_thread.stop)
        await super().shutdown(sockets)
        ending.cancel()


def build_service(
    generator: TextGenerator,
    config: ServeConfig,
    name: str,
    chat_format: ChatFormat,
    api_keys: Sequence[str] = (),
    on_loss: Callable[[DistributedError], None] | None = None,
    *,
    finishing_seconds: float = 5.0,
) -> Server:
    """The server of a generator."""
    metrics = Metrics()
    thread = EngineThread(
        generator.engine,
        metrics,
        queue_size=config.queue_size,
        queue_seconds=config.queue_seconds,
        on_loss=on_loss,
    )
    service = answering.Service(generator, thread, chat_format, name, answering.now())
    return Server(build_application(service, metrics, config, api_keys), thread, config, finishing_seconds)


def read_api_keys(config: ServeConfig) -> list[str]:
    """The keys of --api-key-file."""
    if config.api_key_file is None:
        return []
    try:
        lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --api-key-file {config.api_key_file}", got=error) from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys or not all(key.isascii() for key in keys):
        raise ConfigError(f"{config.api_key_file} holds no usable key", expected="a key of ASCII text on each line")
    return keys


def listening_socket(config: ServeConfig) -> socket.socket:
    """Bound before the model's first request, so that a taken port is an error and port 0 is known."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot listen on {config.host}:{config.port}", got=error.strerror or error, fix="give another --port"
        ) from None
