"""Everything optional that watches a run. Observers get frozen records, so they cannot change a number of it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_retro.artifacts.files import make_folder
from megatron_retro.runtime.events import EventLog
from megatron_retro.runtime.run_records import EvaluationRecord, RunFacts, StepRecord
from megatron_retro.runtime.strict_json import to_plain


class Observer(Protocol):
    """What may watch; `BlankObserver` has all methods empty."""

    def started(self, facts: RunFacts, step: int) -> None:
        """The run begins, or goes on after `step` steps."""
        ...

    def stepped(self, record: StepRecord) -> None: ...

    def evaluated(self, record: EvaluationRecord) -> None: ...

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        """Something else: saved, resumed, a bad step, a stop."""
        ...

    def ended(self) -> None:
        """The run is over, well or not."""
        ...


class BlankObserver:
    """Watches nothing; others override what they watch."""

    def started(self, facts: RunFacts, step: int) -> None: ...

    def stepped(self, record: StepRecord) -> None: ...

    def evaluated(self, record: EvaluationRecord) -> None: ...

    def happened(self, event: str, facts: dict[str, Any]) -> None: ...

    def ended(self) -> None: ...


class JsonLines(BlankObserver):
    """All records as events of a file."""

    def __init__(self, path: Path) -> None:
        self._log = EventLog(path)

    def started(self, facts: RunFacts, step: int) -> None:
        self._log.write("started", step=step, **to_plain(facts))

    def stepped(self, record: StepRecord) -> None:
        self._log.write("step", **to_plain(record))

    def evaluated(self, record: EvaluationRecord) -> None:
        self._log.write("evaluation", **to_plain(record))

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        self._log.write(event, **facts)

    def ended(self) -> None:
        self._log.write("ended")
        self._log.close()


class RankLines(BlankObserver):
    """Times and memory of one rank, every `interval` steps."""

    def __init__(self, path: Path, interval: int) -> None:
        self._log = EventLog(path)
        self._interval = interval

    def stepped(self, record: StepRecord) -> None:
        if record.step % self._interval == 0:
            known = {name: getattr(record, name) for name in ("step", "seconds", "waiting_seconds", "memory_bytes")}
            self._log.write("step", **known)

    def ended(self) -> None:
        self._log.close()


class ProfilerWindow(BlankObserver):
    """`torch.profiler` from one step to another, written as a Chrome trace."""

    def __init__(self, path: Path, first: int, last: int) -> None:
        self._path, self._first, self._last = path, first, last
        self._profiler: Any = None

    def started(self, facts: RunFacts, step: int) -> None:
        self._start_at(step)

    def stepped(self, record: StepRecord) -> None:
        self._start_at(record.step)
        if self._profiler is not None and record.step >= self._last:
            self._stop()

    def _start_at(self, step: int) -> None:
        if step == self._first and self._profiler is None:
            from torch.profiler import profile

            self._profiler = profile(record_shapes=True)
            self._profiler.start()

    def _stop(self) -> None:
        self._profiler.stop()
        make_folder(self._path.parent)
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None

    def ended(self) -> None:
        if self._profiler is not None:
            self._stop()


class GarbageCollection(BlankObserver):
    """Python's garbage collector runs between steps, on every rank after the same one.

    When Python chooses, each rank collects at another step, and all others wait for it. What is there when training
    begins stays, so it is not looked at again.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._frozen = False

    def started(self, facts: RunFacts, step: int) -> None:
        gc.disable()
        if gc.get_freeze_count() == 0:  # a forked process that froze what its parent left keeps it frozen
            gc.collect()
            gc.freeze()
            self._frozen = True

    def stepped(self, record: StepRecord) -> None:
        if record.step % self._interval == 0:
            gc.collect()

    def ended(self) -> None:
        if self._frozen:
            gc.unfreeze()
        gc.enable()


class Observers(BlankObserver):
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def started(self, facts: RunFacts, step: int) -> None:
        for observer in self._observers:
            observer.started(facts, step)

    def stepped(self, record: StepRecord) -> None:
        for observer in self._observers:
            observer.stepped(record)

    def evaluated(self, record: EvaluationRecord) -> None:
        for observer in self._observers:
            observer.evaluated(record)

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        for observer in self._observers:
            observer.happened(event, facts)

    def ended(self) -> None:
        for observer in self._observers:
            observer.ended()
