"""What the ranks of a job tell each other beside their collectives: text through the store in which they met.

A rank has one connection to the store for each channel, however many ranks there are, so a channel may be used by a
thread of its own. All ranks call the same methods in the same order. What fails on one rank fails on all of them.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_retro import errors
from megatron_retro.errors import MegatronRetroError
from megatron_retro.runtime.heartbeat import beat_key
from megatron_retro.runtime.store_calls import StoreCalls
from megatron_retro.runtime.strict_json import json_text

_PART_BYTES = 4 << 20  # the store refuses values of 8 MiB
_LOOK = timedelta(seconds=2)  # how long one waits before looking whether the other is alive
_LOOKS = 5  # at a beat that stands still, until its rank counts as dead


class StoreChannel:
    """One rank's end; of a lone process without a store every call is its own."""

    def __init__(
        self,
        store: Store | None = None,
        rank: int = 0,
        size: int = 1,
        beat_of: Callable[[int], bytes] = lambda rank: b"",
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        """`beat_of` gives a rank's newest heartbeat, nothing where there is none."""
        self.rank, self.size = rank, size
        self._store, self._beat_of, self._timeout = store, beat_of, timeout
        self._call = StoreCalls(timeout.total_seconds() + _LOOKS * _LOOK.total_seconds())
        self._turn = 0
        self._told: list[str] = []  # keys that the first rank deletes when all have read them

    def first(self, act: Callable[[], str]) -> str:
        """What `act` gives on the first rank, on every rank."""
        if self._store is None:
            return act()
        turn = self._next_turn()
        if self.rank:
            return _content(self._receive(f"{turn}/first", 0))
        said, failure = _attempt(act)
        self._send(f"{turn}/first", said)
        if failure is not None:
            raise failure
        return _content(said)

    def gather(self, act: Callable[[], str]) -> list[str]:
        """What `act` gives on every rank, in their order, on the first rank; nothing on others."""
        if self._store is None:
            return [act()]
        turn = self._next_turn()
        said, failure = _attempt(act)
        everyone: list[str] = []
        if self.rank:
            self._send(f"{turn}/from/{self.rank}", said)
        else:
            everyone = [said, *(self._receive(f"{turn}/from/{rank}", rank) for rank in range(1, self.size))]
            self._forget()  # whoever speaks in this turn has read those before it
            self._told += [f"{turn}/from/{rank}" for rank in range(1, self.size)]
            self._send(f"{turn}/all", next(filter(_is_failure, everyone), _spoken("")))
        agreed = _spoken("") if not self.rank else self._receive(f"{turn}/all", 0)
        if failure is not None:
            raise failure
        _content(agreed)
        return [_content(text) for text in everyone]

    def scatter(self, act: Callable[[], Sequence[str]]) -> str:
        """Of what `act` gives on the first rank, each rank its own."""
        if self._store is None:
            return act()[0]
        turn = self._next_turn()
        shares: list[str] = []
        if self.rank:
            return _content(self._receive(f"{turn}/to/{self.rank}", 0))

        def act_once() -> str:
            shares.extend(act())
            return ""

        said, failure = _attempt(act_once)
        for rank in range(1, self.size):
            self._send(f"{turn}/to/{rank}", said if failure is not None else _spoken(shares[rank]))
        if failure is not None:
            raise failure
        return shares[0]

    def barrier(self) -> None:
        """Until all ranks are here; the first, which may keep the store, returns when all others know that."""
        self.gather(str)
        if self._store is None:
            return
        turn = self._next_turn()
        if self.rank:
            self._send(f"{turn}/from/{self.rank}", _spoken(""))
            return
        for rank in range(1, self.size):
            self._receive(f"{turn}/from/{rank}", rank)
        self._told += [f"{turn}/from/{rank}" for rank in range(1, self.size)]

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _send(self, key: str, text: str) -> None:
        assert self._store is not None
        data = zlib.compress(text.encode(), 1)
        parts = [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)]
        for number, part in enumerate(parts[1:], 1):
            self._store.set(f"{key}/{number}", part)  # type: ignore[arg-type]  # torch takes bytes
        self._store.set(key, len(parts).to_bytes(4, "little") + parts[0])  # type: ignore[arg-type]
        if not self.rank:
            self._told += [key, *(f"{key}/{number}" for number in range(1, len(parts)))]

    def _receive(self, key: str, sender: int) -> str:
        return self._call(lambda: self._received(key, sender))

    def _received(self, key: str, sender: int) -> str:
        assert self._store is not None
        self._await(key, sender)
        head = bytes(self._store.get(key))
        rest = [bytes(self._store.get(f"{key}/{number}")) for number in range(1, int.from_bytes(head[:4], "little"))]
        return zlib.decompress(b"".join((head[4:], *rest))).decode()

    def _await(self, key: str, sender: int) -> None:
        """Until the sender has spoken; a store does not tell that it died, its heartbeat does."""
        assert self._store is not None
        deadline, beat, looks = time.monotonic() + self._timeout.total_seconds(), b"", 0
        while True:
            try:
                return self._store.wait([key], _LOOK)
            except RuntimeError as error:  # a store of files says it in other words than one over TCP
                if "timeout" not in str(error).lower():
                    raise
                newest = self._beat_of(sender)
                looks, beat = looks + 1 if newest and newest == beat else 0, newest
                if looks >= _LOOKS or time.monotonic() > deadline:
                    raise RuntimeError(f"timed out waiting for rank {sender} at {key}") from error

    def _forget(self) -> None:
        assert self._store is not None
        for key in self._told:
            self._call(partial(self._store.delete_key, key))
        self._told.clear()


def open_channel(name: str, group: dist.ProcessGroup | None = None, timeout: timedelta | None = None) -> StoreChannel:
    """A channel between the ranks of a group (the default one), which all of them open in the same order."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if len(ranks) == 1:
        return StoreChannel()
    store = dist.distributed_c10d._get_default_store()
    place = f"channel/{name}/{'-'.join(map(str, ranks)) if len(ranks) < dist.get_world_size() else 'all'}"
    patience = timeout or store.timeout  # type: ignore[attr-defined]  # torch's stub leaves it out
    call = StoreCalls(patience.total_seconds())
    number = call(lambda: store.add(f"{place}/opened/{dist.get_rank()}", 1))
    base = call(store.clone)  # type: ignore[attr-defined]  # so does it this

    def beat_of(rank: int) -> bytes:
        key = beat_key(ranks[rank])
        return bytes(base.get(key)) if base.check([key]) else b""

    own = PrefixStore(f"{place}/{number}", base)
    return StoreChannel(own, ranks.index(dist.get_rank()), len(ranks), beat_of, patience)


def _spoken(text: str) -> str:
    return json_text({"said": text})


def _is_failure(said: str) -> bool:
    return said.startswith('{"failed"')


def _attempt(act: Callable[[], str]) -> tuple[str, Exception | None]:
    try:
        return _spoken(act()), None
    except Exception as error:
        return json_text({"failed": type(error).__name__, "why": str(error)}), error


def _content(said: str) -> str:
    """What was said; raises what another rank's act raised."""
    content = json.loads(said)
    if "failed" not in content:
        return str(content["said"])
    kind, why = content["failed"], content["why"]
    named = getattr(errors, kind, None)
    if isinstance(named, type) and issubclass(named, MegatronRetroError):
        raise named(why)
    raise RuntimeError(f"{kind} on another rank: {why}")
