"""Generation with a model that is spread over ranks: the first rank drives, the others are its workers.

Only the driver knows the clients, the prompts and the index. Before each step it broadcasts its commands (new requests,
cancelled texts), which are none for most tokens, and it broadcasts the neighbours of a chunk as it finds them. Engines
are deterministic and every rank sees the same logits, so nothing else has to be sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from megatron_retro.data.tokenizers import Tokenizer
from megatron_retro.errors import DistributedError
from megatron_retro.inference.engine import Engine, EngineLimits
from megatron_retro.inference.forward import Forward
from megatron_retro.inference.generation import Generation, GenerationRequest
from megatron_retro.inference.neighbor_sources import NeighborSource, RetrievedNeighbors
from megatron_retro.inference.sampling import Sampling
from megatron_retro.parallel.replica_channel import ReplicaChannel
from megatron_retro.runtime.strict_json import json_text


class DriverFailed(Exception):
    """The driver could not find neighbours; it reports the reason itself and resets its engine."""


class BroadcastSource:
    """A neighbour source that only the driver searches; all ranks call `find` with the same chunks."""

    def __init__(self, channel: ReplicaChannel, shape: tuple[int, int], source: NeighborSource | None = None) -> None:
        self._channel, self._shape, self._source = channel, shape, source
        self.failure: Exception | None = None

    def find(self, chunks: Sequence[Sequence[int]]) -> list[RetrievedNeighbors]:
        """The neighbours that the driver found."""
        content, self.failure = b"", None
        if self._source is not None:
            try:
                content = _packed(self._source.find(chunks))
            except Exception as error:
                self.failure = error
        content = self._channel.broadcast(content)
        if self.failure is not None:
            raise self.failure
        if not content:
            raise DriverFailed
        return _unpacked(content, self._shape)


def _packed(found: Sequence[RetrievedNeighbors]) -> bytes:
    rows = [
        np.concatenate([one.tokens_KR, one.mask_KR, np.array([one.chunk_ids, one.distances]).T], axis=1)
        for one in found
    ]
    return np.stack(rows).astype(np.float64).tobytes()


def _unpacked(numbers: bytes, shape: tuple[int, int]) -> list[RetrievedNeighbors]:
    count, length = shape
    rows = np.frombuffer(numbers, np.float64).reshape(-1, count, 2 * length + 2)
    return [
        RetrievedNeighbors(
            row[:, :length].astype(np.int64),
            row[:, length : 2 * length] > 0,
            tuple(int(number) for number in row[:, -2]),
            tuple(float(number) for number in row[:, -1]),
        )
        for row in rows
    ]


@dataclass
class Commands:
    """What workers must do before the next step. A request is its number, its source's number or None, plain values."""

    requests: list[tuple[int, int | None, dict[str, Any]]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    reset: bool = False
    stop: bool = False

    def to_bytes(self) -> bytes:
        """JSON; no bytes when there is no command."""
        return json_text(asdict(self)).encode() if self != Commands() else b""

    @classmethod
    def from_bytes(cls, data: bytes) -> Commands:
        """The reverse of `to_bytes`."""
        return cls(**json.loads(data)) if data else cls()


def _values(request: GenerationRequest) -> dict[str, Any]:
    return asdict(replace(request, source=None))


def _request(values: dict[str, Any], source: NeighborSource | None) -> GenerationRequest:
    sampling = Sampling(**values["sampling"])
    plain = {"prompt": tuple(values["prompt"]), "stop_strings": tuple(values["stop_strings"])}
    return GenerationRequest(**{**values, **plain, "sampling": sampling, "source": source})


class DriverEngine(Engine):
    """The driver's engine; its owner must `close` it, or the workers wait for ever."""

    def __init__(self, forward: Forward, tokenizer: Tokenizer, limits: EngineLimits, channel: ReplicaChannel) -> None:
        super().__init__(forward, tokenizer, limits)
        self._channel = channel
        self._commands = Commands()
        self._closed = False
        self._numbers: WeakKeyDictionary[Generation, int] = WeakKeyDictionary()
        self._shared: WeakValueDictionary[int, BroadcastSource] = WeakValueDictionary()
        self._count = 0

    def submit(self, request: GenerationRequest, listener: Callable[[str], None] | None = None) -> Generation:
        """Queue a request; refused if it can never fit."""
        shared, number = None, None
        if request.source is not None:
            number = id(request.source)  # a shared source keeps its source alive, so nobody else has this number
            shared = self._shared.get(number) or BroadcastSource(
                self._channel, self.forward.neighbor_shape, request.source
            )
            self._shared[number] = shared
        generation = super().submit(replace(request, source=shared), listener)
        self._count += 1
        self._numbers[generation] = self._count
        self._commands.requests.append((self._count, number, _values(request)))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop a text; its place is free at the next step."""
        if not generation.finished:
            self._commands.cancelled.append(self._numbers[generation])
        super().cancel(generation)

    def reset(self) -> None:
        """Forget everything, after a step that failed."""
        self._commands = Commands(reset=True)
        super().reset()

    def step(self) -> bool:
        """Broadcast the commands, then do the same as the workers."""
        commands, self._commands = self._commands, Commands()
        self._channel.broadcast(commands.to_bytes())
        try:
            return super().step()
        except Exception as error:
            if any(source.failure is error for source in self._shared.values()):
                raise  # the workers were told by the source
            self._closed = True  # the workers are not in step and would not receive a stop
            raise DistributedError(
                "the ranks of this model are out of step: one of them failed on its own",
                got=f"{type(error).__name__}: {error}",
                fix="start all of them again; every rank's log has its own part of the story",
            ) from error

    def close(self) -> None:
        """Tell the workers to stop."""
        if not self._closed:
            self._closed = True
            self._channel.broadcast(Commands(stop=True).to_bytes())


def run_worker(engine: Engine, channel: ReplicaChannel) -> None:
    """Repeat on this rank what the driver does, until the driver is closed."""
    texts: dict[int, Generation] = {}
    shared: WeakValueDictionary[int, BroadcastSource] = WeakValueDictionary()
    while not (commands := Commands.from_bytes(channel.broadcast())).stop:
        if commands.reset:
            engine.reset()
        for number, place, values in commands.requests:
            source = None
            if place is not None:
                source = shared.get(place) or BroadcastSource(channel, engine.forward.neighbor_shape)
                shared[place] = source
            texts[number] = engine.submit(_request(values, source))
        for number in commands.cancelled:
            engine.cancel(texts[number])
        try:
            engine.step()
        except DriverFailed:
            engine.reset()
        texts = {number: one for number, one in texts.items() if not one.finished}
