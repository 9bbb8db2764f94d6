"""Everything optional that watches a run. Observers get frozen records, so they cannot change a number of it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_retro.artifacts.files import make_folder
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.runtime.console import readable_bytes, readable_count, readable_seconds, say, warn
from megatron_retro.runtime.events import EventLog
from megatron_retro.runtime.run_records import EvaluationRecord, RetrievalHealth, RunFacts, StepRecord
from megatron_retro.runtime.strict_json import to_plain


class Observer(Protocol):
    """What may watch; `BlankObserver` has all methods empty."""

    def started(self, facts: RunFacts, step: int) -> None:
        """The run begins, or goes on after `step` steps."""
        ...

    def stepped(self, record: StepRecord) -> None:
        """A step is over."""
        ...

    def evaluated(self, record: EvaluationRecord) -> None:
        """An evaluation is over."""
        ...

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        """Something else: saved, resumed, a bad step, a stop."""
        ...

    def ended(self) -> None:
        """The run is over, well or not."""
        ...


class BlankObserver:
    """Watches nothing; others override what they watch."""

    def started(self, facts: RunFacts, step: int) -> None:
        """Nothing."""

    def stepped(self, record: StepRecord) -> None:
        """Nothing."""

    def evaluated(self, record: EvaluationRecord) -> None:
        """Nothing."""

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        """Nothing."""

    def ended(self) -> None:
        """Nothing."""


class JsonLines(BlankObserver):
    """All records as events of a file."""

    def __init__(self, path: Path) -> None:
        self._log = EventLog(path)

    def started(self, facts: RunFacts, step: int) -> None:
        """One event."""
        self._log.write("started", step=step, **to_plain(facts))

    def stepped(self, record: StepRecord) -> None:
        """One event."""
        self._log.write("step", **to_plain(record))

    def evaluated(self, record: EvaluationRecord) -> None:
        """One event."""
        self._log.write("evaluation", **to_plain(record))

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        """One event."""
        self._log.write(event, **facts)

    def ended(self) -> None:
        """Close the file."""
        self._log.write("ended")
        self._log.close()


class RankLines(BlankObserver):
    """Times and memory of one rank, to find the slow one."""

    def __init__(self, path: Path, interval: int) -> None:
        self._log = EventLog(path)
        self._interval = interval

    def stepped(self, record: StepRecord) -> None:
        """Now and then."""
        if record.step % self._interval == 0:
            self._log.write("step", step=record.step, seconds=record.seconds, memory_bytes=record.memory_bytes)

    def ended(self) -> None:
        """Close the file."""
        self._log.close()


class Throughput:
    """Rates over the last steps."""

    def __init__(self, facts: RunFacts, window: int = 100) -> None:
        self._facts = facts
        self._steps: deque[StepRecord] = deque(maxlen=window)

    def add(self, record: StepRecord) -> None:
        """Count a step."""
        self._steps.append(record)

    def tokens_per_second(self) -> float:
        """Tokens of the whole run, all ranks together."""
        tokens = sum(record.positions for record in self._steps)
        return tokens / max(sum(record.step_seconds for record in self._steps), 1e-9)

    def utilization(self) -> float | None:
        """Share of the devices' peak that the model's own operations use."""
        if self._facts.peak_flops is None:
            return None
        return (
            self.tokens_per_second() * self._facts.flops_per_token / (self._facts.peak_flops * self._facts.world_size)
        )

    def flops_per_second(self) -> float:
        """Operations of the model per second and device."""
        return self.tokens_per_second() * self._facts.flops_per_token / self._facts.world_size

    def data_wait(self) -> float:
        """Share of the time that went into waiting for data."""
        total = sum(record.step_seconds for record in self._steps)
        return sum(record.seconds.get("data", 0.0) for record in self._steps) / max(total, 1e-9)

    def seconds_left(self) -> float:
        """Until the last sample, at the present rate."""
        if not self._steps:
            return 0.0
        last = self._steps[-1]
        per_sample = sum(record.step_seconds for record in self._steps) / sum(
            record.batch_size for record in self._steps
        )
        return max(0, self._facts.total_samples - last.samples) * per_sample


class ConsoleLines(BlankObserver):
    """A line every `interval` steps, evaluations, and alarms that cannot be overlooked."""

    def __init__(self, interval: int, show_throughput: bool) -> None:
        self._interval = interval
        self._show_throughput = show_throughput
        self._losses: list[float] = []
        self._throughput: Throughput | None = None

    def started(self, facts: RunFacts, step: int) -> None:
        """Say what runs."""
        self._throughput = Throughput(facts)
        kinds = "".join(f"\n  {operator}: {choice}" for operator, choice in sorted(facts.backends.items()))
        say(
            f"{readable_count(facts.parameters)} parameters, {readable_count(facts.flops_per_token)} operations per "
            f"token, {facts.world_size} process(es), {readable_count(facts.total_samples)} samples{kinds}"
        )
        if step:
            say(f"resumed after step {step}")

    def stepped(self, record: StepRecord) -> None:
        """Collect, and say it when it is time."""
        if self._throughput is not None:
            self._throughput.add(record)
        self._losses.append(record.loss)
        if record.step % self._interval == 0:
            say(self._line(record))
            self._losses.clear()

    def _line(self, record: StepRecord) -> str:
        parts = [
            f"step {record.step}",
            f"loss {statistics.fmean(self._losses):.4f}",
            f"norm {record.gradient_norm:.3f}",
            f"rate {record.learning_rate:.3e}",
            f"samples {record.samples}",
        ]
        parts += [f"{name} {loss:.2e}" for name, loss in record.extra_losses.items()]
        if record.loss_scale != 1.0:
            parts.append(f"scale {record.loss_scale:g}")
        if self._show_throughput and self._throughput is not None:
            parts.append(f"{readable_count(self._throughput.tokens_per_second())} tokens/s")
            parts.append(f"{readable_count(self._throughput.flops_per_second())} FLOP/s")
            share = self._throughput.utilization()
            if share is not None:
                parts.append(f"MFU {share:.1%}")
            parts.append(f"data wait {self._throughput.data_wait():.1%}")
            parts.append(readable_bytes(record.memory_bytes))
            parts.append(f"{readable_seconds(self._throughput.seconds_left())} left")
        return "  ".join(parts)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Say the losses, with intervals, and the alarms."""
        say(f"evaluation after step {record.step}: loss {record.loss:.4f}")
        for variant, cost in (record.retrieval.excess if record.retrieval else {}).items():
            say(f"  {variant} neighbours cost {cost} nats per token more than real ones")
        if record.alarms:
            warn("this model does not use its neighbours:\n" + "\n".join(f"  - {alarm}" for alarm in record.alarms))

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        """Say it; what is bad, loudly."""
        text = f"{event}: " + ", ".join(f"{name} {value}" for name, value in facts.items())
        if event in ("bad step", "rollback", "damaged checkpoint", "lost rank"):
            warn(text)
        else:
            say(text)


class TensorBoard(BlankObserver):
    """The curves for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentProblem(
                "--tensorboard-dir needs TensorBoard", got=error, fix="pip install megatron-retro[tensorboard]"
            ) from None
        make_folder(directory)
        self._writer: Any = SummaryWriter(str(directory))

    def stepped(self, record: StepRecord) -> None:
        """Scalars of a step."""
        for name in ("loss", "gradient_norm", "learning_rate", "batch_size", "loss_scale", "step_seconds"):
            self._writer.add_scalar(f"train/{name}", getattr(record, name), record.step)
        for name, loss in record.extra_losses.items():
            self._writer.add_scalar(f"train/{name}", loss, record.step)
        for name, seconds in record.seconds.items():
            self._writer.add_scalar(f"seconds/{name}", seconds, record.step)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Scalars of an evaluation."""
        self._writer.add_scalar("validation/loss", record.loss, record.step)
        health = record.retrieval or RetrievalHealth()
        for variant, cost in health.excess.items():
            for name, value in (("", cost.mean), ("_low", cost.low), ("_high", cost.high)):
                self._writer.add_scalar(f"retrieval/excess_{variant}{name}", value, record.step)
        for use in health.layers:
            self._writer.add_scalar(f"retrieval/share_layer_{use.layer}", use.share, record.step)

    def ended(self) -> None:
        """Close the files."""
        self._writer.close()


class ProfilerWindow(BlankObserver):
    """`torch.profiler` from one step to another, written as a Chrome trace."""

    def __init__(self, path: Path, first: int, last: int) -> None:
        self._path, self._first, self._last = path, first, last
        self._profiler: Any = None

    def started(self, facts: RunFacts, step: int) -> None:
        """Start at once when the window begins with the first step."""
        self._start_at(step)

    def stepped(self, record: StepRecord) -> None:
        """Start or stop between steps."""
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
        """Write what there is."""
        if self._profiler is not None:
            self._stop()


class Observers(BlankObserver):
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def started(self, facts: RunFacts, step: int) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.started(facts, step)

    def stepped(self, record: StepRecord) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.stepped(record)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.evaluated(record)

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.happened(event, facts)

    def ended(self) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.ended()
