"""One rank leads, the others of its replica follow: they hear what its engine is asked to do, and theirs do it too.

Only the leader knows clients, questions and the index. Before each step it says what is new (requests, cancelled
texts), which is nothing for most tokens; what it finds for a chunk is told as it is found. All else follows from that:
engines are deterministic, and every rank sees the same logits.
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
from megatron_retro.inference.neighbor_sources import Found, NeighborSource
from megatron_retro.inference.sampling import Sampling
from megatron_retro.parallel.replica_channel import ReplicaChannel
from megatron_retro.runtime.strict_json import json_text


class LeaderFailed(Exception):
    """The leader could not find neighbours; it says itself why, and forgets what it was doing."""


class SharedSource:
    """A source that the leader asks and the others hear; all of them call `find` with the same chunks."""

    def __init__(self, channel: ReplicaChannel, shape: tuple[int, int], source: NeighborSource | None = None) -> None:
        self._channel, self._shape, self._source = channel, shape, source
        self.failure: Exception | None = None

    def find(self, chunks: Sequence[Sequence[int]]) -> list[Found]:
        """What the leader found."""
        numbers, self.failure = b"", None
        if self._source is not None:
            try:
                numbers = _written(self._source.find(chunks))
            except Exception as error:
                self.failure = error
        numbers = self._channel.share(numbers)
        if self.failure is not None:
            raise self.failure
        if not numbers:
            raise LeaderFailed
        return _read(numbers, self._shape)


def _written(found: Sequence[Found]) -> bytes:
    rows = [
        np.concatenate([one.tokens_KR, one.mask_KR, np.array([one.chunk_ids, one.distances]).T], axis=1)
        for one in found
    ]
    return np.stack(rows).astype(np.float64).tobytes()


def _read(numbers: bytes, shape: tuple[int, int]) -> list[Found]:
    count, length = shape
    rows = np.frombuffer(numbers, np.float64).reshape(-1, count, 2 * length + 2)
    return [
        Found(
            row[:, :length].astype(np.int64),
            row[:, length : 2 * length] > 0,
            tuple(int(number) for number in row[:, -2]),
            tuple(float(number) for number in row[:, -1]),
        )
        for row in rows
    ]


@dataclass
class Orders:
    """What is new since the last step. Requests: number, number of the source (None: no source), plain values."""

    requests: list[tuple[int, int | None, dict[str, Any]]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    reset: bool = False
    stop: bool = False

    def written(self) -> bytes:
        """As bytes; none when nothing is new."""
        return json_text(asdict(self)).encode() if self != Orders() else b""

    @classmethod
    def read(cls, data: bytes) -> Orders:
        """From bytes."""
        return cls(**json.loads(data)) if data else cls()


def _values(request: GenerationRequest) -> dict[str, Any]:
    return asdict(replace(request, source=None))


def _request(values: dict[str, Any], source: NeighborSource | None) -> GenerationRequest:
    sampling = Sampling(**values["sampling"])
    plain = {"prompt": tuple(values["prompt"]), "stop_strings": tuple(values["stop_strings"])}
    return GenerationRequest(**{**values, **plain, "sampling": sampling, "source": source})


class LeadingEngine(Engine):
    """The first rank's engine; its owner must `close` it, or the others wait for ever."""

    def __init__(self, forward: Forward, tokenizer: Tokenizer, limits: EngineLimits, channel: ReplicaChannel) -> None:
        super().__init__(forward, tokenizer, limits)
        self._channel = channel
        self._orders = Orders()
        self._closed = False
        self._numbers: WeakKeyDictionary[Generation, int] = WeakKeyDictionary()
        self._shared: WeakValueDictionary[int, SharedSource] = WeakValueDictionary()
        self._count = 0

    def submit(self, request: GenerationRequest, listener: Callable[[str], None] | None = None) -> Generation:
        """Queue a request; refused if it can never fit."""
        shared, number = None, None
        if request.source is not None:
            number = id(request.source)  # a shared source keeps its source alive, so nobody else has this number
            shared = self._shared.get(number) or SharedSource(
                self._channel, self.forward.neighbor_shape, request.source
            )
            self._shared[number] = shared
        generation = super().submit(replace(request, source=shared), listener)
        self._count += 1
        self._numbers[generation] = self._count
        self._orders.requests.append((self._count, number, _values(request)))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop a text; its place is free at the next step."""
        if not generation.finished:
            self._orders.cancelled.append(self._numbers[generation])
        super().cancel(generation)

    def reset(self) -> None:
        """Forget everything, after a step that failed."""
        self._orders = Orders(reset=True)
        super().reset()

    def step(self) -> bool:
        """Tell the others, then do the same."""
        orders, self._orders = self._orders, Orders()
        self._channel.share(orders.written())
        try:
            return super().step()
        except Exception as error:
            if any(source.failure is error for source in self._shared.values()):
                raise  # the others know
            self._closed = True  # they would not listen any more
            raise DistributedError(
                "the ranks of this model are out of step: one of them failed on its own",
                got=f"{type(error).__name__}: {error}",
                fix="start all of them again; every rank's log has its own part of the story",
            ) from error

    def close(self) -> None:
        """Let the others go."""
        if not self._closed:
            self._closed = True
            self._channel.share(Orders(stop=True).written())


def follow(engine: Engine, channel: ReplicaChannel) -> None:
    """Do what the leader does until it is closed."""
    texts: dict[int, Generation] = {}
    shared: WeakValueDictionary[int, SharedSource] = WeakValueDictionary()
    while not (orders := Orders.read(channel.share())).stop:
        if orders.reset:
            engine.reset()
        for number, place, values in orders.requests:
            source = None
            if place is not None:
                source = shared.get(place) or SharedSource(channel, engine.forward.neighbor_shape)
                shared[place] = source
            texts[number] = engine.submit(_request(values, source))
        for number in orders.cancelled:
            engine.cancel(texts[number])
        try:
            engine.step()
        except LeaderFailed:
            engine.reset()
        texts = {number: one for number, one in texts.items() if not one.finished}
