"""Who is alive, where, and how fast: each rank tells a shared store its step, phase and pace every second.

A thread does it. When a collective fails, nobody in it knows who is to blame. The heartbeats do: a rank whose beat
stands still is dead or stopped, and one that beats but is behind the others is stuck in the phase that it names. While
all is well, the paces say which rank the others wait for.

NCCL's watchdog ends a process before Python hears of a collective that does not end. So the thread looks itself: when
its rank's own step stands still for long, the culprits are written into the run's directory, where they outlive it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_retro.runtime.run_log import CULPRITS
from megatron_retro.runtime.store_calls import StoreCalls
from megatron_retro.runtime.strict_json import from_plain, json_text, to_plain

_STORE_TIMEOUT = timedelta(seconds=3)
_LONGEST_CALL = 10.0  # of a store whose process may be stopped
_BEATS_APART = 3  # between two looks at all ranks


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


@dataclass(frozen=True)
class Culprit:
    """A rank on which the others wait, and why they do."""

    rank: int
    node: str
    process: int
    step: int
    phase: str
    what: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.node}) {self.what}"


@dataclass(frozen=True)
class Blame:
    """Who is to blame for a collective that does not end, in words; without a culprit every rank looks well."""

    words: str
    culprits: tuple[Culprit, ...] = ()


def blame(before: Sequence[Beat], now: Sequence[Beat]) -> Blame:
    """From two looks at all ranks, a few beats apart: who is silent, else who is behind, else who does other things."""
    last, ahead = min(beat.step for beat in now), max(beat.step for beat in now)
    phases = Counter(beat.phase for beat in now)
    usual, count = phases.most_common(1)[0]
    found = [
        _culprit(beat, f"is dead or stopped since step {beat.step}, {beat.phase}")
        for beat, old in zip(now, before, strict=True)
        if beat.count == old.count
    ]
    if not found and last < ahead:
        found = [
            _culprit(beat, f"is stuck at step {beat.step}, {beat.phase}; others are at {ahead}")
            for beat in now
            if beat.step == last
        ]
    if not found and 2 * count > len(now):
        found = [
            _culprit(beat, f"is at step {beat.step}, {beat.phase}; {count} others are at {usual}")
            for beat in now
            if beat.phase != usual
        ]
    if found:
        return Blame("; ".join(map(str, found)), tuple(found))
    told = ", ".join(f"{number} in {phase}" for phase, number in sorted(phases.items()))
    return Blame(f"every rank is alive and at step {last}: {told}")


def _culprit(beat: Beat, what: str) -> Culprit:
    return Culprit(beat.rank, beat.host, beat.process, beat.step, beat.phase, what)


class Heartbeat:
    """This rank's beats, and a look at everyone's."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        interval: float = 1.0,
        run: Path | None = None,
        patience: float = math.inf,
    ) -> None:
        """`run` is where culprits are written when this rank's step stands still for `patience` seconds."""
        self._call = StoreCalls(_LONGEST_CALL)
        self._store: Store = self._call(store.clone)  # type: ignore[attr-defined]  # a connection of its own
        self._store.set_timeout(_STORE_TIMEOUT)
        self._rank, self._world_size, self._interval = rank, world_size, interval
        self._step, self._phase, self._count = 0, "start", 0
        self._pace = Pace()
        self._run, self._patience = run, patience
        self._noted_at, self._blamed = time.monotonic(), False
        self._before: tuple[int, list[Beat] | str] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def note(self, step: int, phase: str) -> None:
        """Where this rank is now; costs nothing."""
        self._step, self._phase, self._noted_at = step, phase, time.monotonic()

    def tell_pace(self, pace: Pace) -> None:
        """How long a step takes this rank now; costs nothing."""
        self._pace = pace

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _beat_on(self) -> None:
        while not self._stop.wait(self._interval):
            self._count += 1
            with suppress(RuntimeError):  # the store's host may be gone; the collectives will say so
                self._beat()
            self._look()

    def _beat(self) -> None:
        beat = {
            "count": self._count,
            "step": self._step,
            "phase": self._phase,
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "process": os.getpid(),
            "pace": to_plain(self._pace),
        }
        self._call(lambda: self._store.set(beat_key(self._rank), json_text(beat)))

    def everyone(self) -> list[Beat]:
        """What each rank last told, in their order."""
        keys = [beat_key(rank) for rank in range(self._world_size)]
        told = self._call(lambda: self._store.multi_get(keys))
        return [from_plain(Beat, {"rank": rank, **json.loads(text)}) for rank, text in enumerate(told)]

    def blame(self) -> Blame:
        """Who is to blame for a collective that failed; takes a few beats of time."""
        try:
            before = self.everyone()
            time.sleep(_BEATS_APART * self._interval)
            return blame(before, self.everyone())
        except RuntimeError as error:
            return _lost_store(str(error))

    def write(self, found: Blame, step: int) -> None:
        """Leave it in the run's directory; of all ranks that are well the first one does."""
        blamed = {culprit.rank for culprit in found.culprits}
        writer = next((rank for rank in range(self._world_size) if rank not in blamed), 0)
        if self._run is None or (found.culprits and writer != self._rank):
            return
        facts = {"time": round(time.time(), 3), "step": step, "words": found.words, "told by rank": self._rank}
        text = json_text({**facts, "culprits": [to_plain(culprit) for culprit in found.culprits]}, indent=1)
        partial = self._run / f"{CULPRITS}.{self._rank}"
        with suppress(OSError):  # a full disk may be why
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, self._run / CULPRITS)

    def _look(self) -> None:
        """Write who is to blame when this rank's step stands still; take it back when it goes on after all.

        Called with each beat, it looks twice, a few beats apart: all ranks do so at once, and must not seem silent.
        """
        if time.monotonic() - self._noted_at < self._patience:
            if self._blamed and self._run is not None:
                (self._run / CULPRITS).unlink(missing_ok=True)
            self._before, self._blamed = None, False
            return
        if self._before is None:
            self._before = (self._count, self._everyone_or_fault())
        elif not self._blamed and self._count >= self._before[0] + _BEATS_APART:
            before, now = self._before[1], self._everyone_or_fault()
            fault = next((look for look in (before, now) if isinstance(look, str)), None)
            self.write(_lost_store(fault) if fault is not None else blame(before, now), self._step)  # type: ignore[arg-type]
            self._blamed = True

    def _everyone_or_fault(self) -> list[Beat] | str:
        try:
            return self.everyone()
        except RuntimeError as error:
            return str(error)


def _lost_store(fault: str) -> Blame:
    return Blame(f"rank 0, which keeps the store of all ranks, does not answer ({fault.splitlines()[0]})")


def start_heartbeat(
    interval: float = 1.0, run: Path | None = None, timeout: timedelta = timedelta(minutes=10)
) -> Heartbeat | None:
    """The heartbeat of this rank; None for a process that is alone. Needs the default process group.

    It is patient for a third of the collectives' timeout, so that it has written before they end the process.
    """
    if dist.get_world_size() == 1:
        return None
    store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    heartbeat = Heartbeat(store, rank, world_size, interval, run, timeout.total_seconds() / 3)
    heartbeat.start()
    return heartbeat
