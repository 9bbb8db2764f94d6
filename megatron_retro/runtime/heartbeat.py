"""Who is alive, where, and how fast: each rank tells a shared store its step, phase and pace every second.

A thread does it. When a collective fails, nobody in it knows who is to blame. The heartbeats do: a rank whose beat
stands still is dead or stopped, and one that beats but is behind the others is stuck in the phase that it names. While
all is well, the paces say which rank the others wait for.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_retro.runtime.strict_json import from_plain, json_text, to_plain

_STORE_TIMEOUT = timedelta(seconds=3)


def beat_key(rank: int) -> str:
    """Where the default group's store keeps a rank's newest beat."""
    return f"heartbeat/{rank}"


@dataclass(frozen=True)
class Pace:
    """Seconds of a recent step that a rank computed and waited for others; all zero before it is known."""

    computing: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class Beat:
    """What one rank last told."""

    rank: int
    count: int
    step: int
    phase: str
    host: str
    process: int
    pace: Pace = Pace()

    @property
    def process_and_host(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def place(self) -> str:
        """The rank and where it runs."""
        return f"rank {self.rank} ({self.process_and_host})"


class Heartbeat:
    """This rank's beats, and a look at everyone's."""

    def __init__(self, store: Store, rank: int, world_size: int, interval: float = 1.0) -> None:
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # a connection of its own
        self._store.set_timeout(_STORE_TIMEOUT)
        self._rank, self._world_size, self._interval = rank, world_size, interval
        self._step, self._phase, self._count = 0, "start", 0
        self._pace = Pace()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def note(self, step: int, phase: str) -> None:
        """Where this rank is now; costs nothing."""
        self._step, self._phase = step, phase

    def tell_pace(self, pace: Pace) -> None:
        """How long a step takes this rank now; costs nothing."""
        self._pace = pace

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _beat_on(self) -> None:
        while not self._stop.wait(self._interval):
            with suppress(RuntimeError):  # the store's host may be gone; the collectives will say so
                self._beat()

    def _beat(self) -> None:
        self._count += 1
        beat = {
            "count": self._count,
            "step": self._step,
            "phase": self._phase,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "pace": to_plain(self._pace),
        }
        self._store.set(beat_key(self._rank), json_text(beat))

    def everyone(self) -> list[Beat]:
        """What each rank last told, in their order."""
        told = self._store.multi_get([beat_key(rank) for rank in range(self._world_size)])
        return [from_plain(Beat, {"rank": rank, **json.loads(text)}) for rank, text in enumerate(told)]

    def culprits(self) -> str:
        """Who is to blame for a collective that failed, in words; takes a few beats of time."""
        try:
            before = self.everyone()
            time.sleep(3 * self._interval)
            now = self.everyone()
        except RuntimeError as error:
            return f"rank 0, which keeps the store of all ranks, does not answer ({str(error).splitlines()[0]})"
        silent = [beat for beat, old in zip(now, before, strict=True) if beat.count == old.count]
        if silent:
            return "; ".join(f"{beat.place} is dead or stopped since step {beat.step}, {beat.phase}" for beat in silent)
        last = min(beat.step for beat in now)
        ahead = max(beat.step for beat in now)
        behind = [beat for beat in now if beat.step == last]
        if last == ahead:
            return "every rank is alive and at the same step; phases: " + ", ".join(
                f"{beat.rank} {beat.phase}" for beat in now
            )
        return "; ".join(
            f"{beat.place} is stuck at step {beat.step}, {beat.phase}; others are at {ahead}" for beat in behind
        )


def start_heartbeat(interval: float = 1.0) -> Heartbeat | None:
    """The heartbeat of this rank; None for a process that is alone. Needs the default process group."""
    if dist.get_world_size() == 1:
        return None
    heartbeat = Heartbeat(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), interval)
    heartbeat.start()
    return heartbeat
