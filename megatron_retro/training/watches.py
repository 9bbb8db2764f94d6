"""What a run is watched for: a rank that all others wait for, throughput that falls, reads from object stores."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from megatron_retro.artifacts.stored_artifact import Traffic
from megatron_retro.runtime.console import readable_bytes, readable_count
from megatron_retro.runtime.heartbeat import Beat, Heartbeat, Pace
from megatron_retro.runtime.run_records import RunFacts, StepRecord
from megatron_retro.training.console_lines import Throughput
from megatron_retro.training.observers import BlankObserver

Tell = Callable[[str, dict[str, Any]], None]
CHECK_SECONDS = 5.0
SLOWER = 1.2  # times the median of the ranks that do the same work
FALLEN = 2 / 3  # of the usual throughput
_WINDOW = 20  # steps
_FEWEST = 10  # of them, before a pace is told
_FIRST_STEPS = 3  # of a start: they compile, allocate and read for the first time


class PaceOfRank(BlankObserver):
    """Tells all ranks how long this one computes in a step, and how long it waits for others."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._steps: deque[StepRecord] = deque(maxlen=_WINDOW)
        self._seen = 0

    def stepped(self, record: StepRecord) -> None:
        self._seen += 1
        if self._seen <= _FIRST_STEPS:
            return
        self._steps.append(record)
        if len(self._steps) >= _FEWEST:
            computing = statistics.fmean(step.computing_seconds for step in self._steps)
            waiting = statistics.fmean(step.waiting_seconds for step in self._steps)
            self._heartbeat.tell_pace(Pace(computing, waiting))


class StoreReads(BlankObserver):
    """Tells every `interval` steps, and at the end, what this rank has fetched from object stores since its start."""

    def __init__(self, traffic: Callable[[], Traffic], interval: int, tell: Tell) -> None:
        self._traffic, self._interval, self._tell = traffic, interval, tell
        self._told = 0

    def stepped(self, record: StepRecord) -> None:
        if record.step % self._interval == 0:
            self.ended()

    def ended(self) -> None:
        now = self._traffic()
        if now.asked > self._told:
            self._told = now.asked
            self._tell("object stores", {"fetched": readable_bytes(now.fetched_bytes), "from the cache": now.share_had})


class SlowRanks(BlankObserver):
    """Names each rank once that is slower than those that do the same work, and again when it was not for a while.

    Ranks of different pipeline stages do different work, so each stage has a median of its own. A rank is named when
    two looks in a row find it slow.
    """

    def __init__(self, heartbeat: Heartbeat, ranks_per_stage: int, tell: Tell) -> None:
        self._heartbeat, self._ranks_per_stage, self._tell = heartbeat, ranks_per_stage, tell
        self._last = time.monotonic()
        self._suspected: set[int] = set()
        self._named: set[int] = set()

    def stepped(self, record: StepRecord) -> None:
        now = time.monotonic()
        if now - self._last < CHECK_SECONDS:
            return
        self._last = now
        with suppress(RuntimeError):  # the store's host may be gone; the collectives will say so
            self._look(record.step, self._heartbeat.everyone())

    def _look(self, step: int, beats: Sequence[Beat]) -> None:
        slow: dict[int, float] = {}
        for first in range(0, len(beats), self._ranks_per_stage):
            slow |= slow_ranks(beats[first : first + self._ranks_per_stage])
        for rank, typical in sorted(slow.items(), key=lambda found: -beats[found[0]].pace.computing):
            if rank in self._suspected and rank not in self._named:
                pace = beats[rank].pace
                self._tell(
                    "slow rank",
                    {
                        "step": step,
                        "rank": rank,
                        "place": beats[rank].process_and_host,
                        "computing": f"{1000 * pace.computing:.0f} ms a step, the median is {1000 * typical:.0f} ms",
                        "waiting": f"{1000 * pace.waiting:.0f} ms",
                    },
                )
                self._named.add(rank)
        self._named &= self._suspected | set(slow)
        self._suspected = set(slow)


def slow_ranks(beats: Sequence[Beat]) -> dict[int, float]:
    """The ranks of a stage that compute 20 % longer than their median, each with that median in seconds."""
    if len(beats) < 2 or not all(beat.pace.computing for beat in beats):
        return {}
    typical = statistics.median_low(beat.pace.computing for beat in beats)
    return {beat.rank: typical for beat in beats if beat.pace.computing > SLOWER * typical}


class FallingThroughput(BlankObserver):
    """Says once when throughput is a third below what it was, and again when it had come back."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._throughput = Throughput(RunFacts())
        self._fallen = False

    def stepped(self, record: StepRecord) -> None:
        self._throughput.add(record)
        usual = self._throughput.usual()
        if usual is None:
            return
        rate = self._throughput.tokens_per_second()
        if rate < FALLEN * usual and not self._fallen:
            facts = {"step": record.step, "tokens per second": readable_count(rate)}
            self._tell("throughput fell", {**facts, "usual": readable_count(usual)})
        self._fallen = rate < FALLEN * usual or (self._fallen and rate < 0.9 * usual)
