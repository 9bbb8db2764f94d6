"""What a person reads while a run goes on: a line of figures at least every half minute, evaluations, and alarms."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from typing import Any

from megatron_retro.runtime.console import alarm, readable_bytes, readable_count, readable_seconds, say
from megatron_retro.runtime.run_records import EvaluationRecord, RunFacts, StepRecord
from megatron_retro.training.observers import BlankObserver

LONGEST_SILENCE = 30.0  # seconds
ALARMS = ("bad step", "rollback", "damaged checkpoint", "lost rank", "slow rank", "throughput fell")
_NEWEST = 10  # steps whose median is the present rate
_USUAL = 200  # steps before them whose median is the usual one
_FEWEST = 20  # of them, before there is one


class Throughput:
    """Rates over the last steps; time that goes into saving is left out, for it comes in single steps."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._steps: deque[StepRecord] = deque(maxlen=_USUAL + _NEWEST)

    def add(self, record: StepRecord) -> None:
        self._steps.append(record)

    def step_seconds(self) -> float:
        return statistics.median(map(_without_saving, self._newest))

    def tokens_per_second(self) -> float:
        """Tokens of the whole run, all ranks together, now."""
        return statistics.median(map(_rate, self._newest))

    def usual(self) -> float | None:
        """Tokens per second of the steps before; None before there were enough."""
        before = list(self._steps)[:-_NEWEST]
        return statistics.median(map(_rate, before)) if len(before) >= _FEWEST else None

    def utilization(self) -> float | None:
        """Share of the devices' peak that the model's own operations use."""
        peak = self._facts.peak_flops
        return None if peak is None else self.flops_per_second() / peak

    def flops_per_second(self) -> float:
        """Operations of the model per second and device."""
        return self.tokens_per_second() * self._facts.flops_per_token / self._facts.world_size

    def share(self, seconds: Any) -> float:
        """Part of the newest steps' time that `seconds(step)` is."""
        total = sum(step.step_seconds for step in self._newest)
        return float(sum(map(seconds, self._newest)) / max(total, 1e-9))

    def steps_left(self) -> int:
        """Until the last sample, at the present batch size."""
        last = self._steps[-1]
        return math.ceil(max(0, self._facts.total_samples - last.samples) / max(last.batch_size, 1))

    def seconds_left(self) -> float:
        """Until the last sample, at the mean pace of all known steps, saving included."""
        return self.steps_left() * statistics.fmean(step.step_seconds for step in self._steps)

    @property
    def _newest(self) -> list[StepRecord]:
        return list(self._steps)[-_NEWEST:]


class ConsoleLines(BlankObserver):
    """A line every `interval` steps, and after a step that ends a long silence."""

    def __init__(self, interval: int, show_throughput: bool) -> None:
        self._interval = interval
        self._show_throughput = show_throughput
        self._losses: list[float] = []
        self._throughput = Throughput(RunFacts())
        self._several = False
        self._last = time.monotonic()

    def started(self, facts: RunFacts, step: int) -> None:
        self._throughput, self._several = Throughput(facts), facts.world_size > 1
        self._last = time.monotonic()
        kinds = "".join(f"\n  {operator}: {choice}" for operator, choice in sorted(facts.backends.items()))
        say(
            f"{readable_count(facts.parameters)} parameters, {readable_count(facts.flops_per_token)} operations per "
            f"token, {facts.world_size} process(es), {readable_count(facts.total_samples)} samples{kinds}"
        )
        if step:
            say(f"resumed after step {step}")

    def stepped(self, record: StepRecord) -> None:
        self._throughput.add(record)
        self._losses.append(record.loss)
        now = time.monotonic()
        if record.step % self._interval == 0 or now - self._last >= LONGEST_SILENCE:
            self._last = now
            say(self._line(record))
            self._losses.clear()

    def _line(self, record: StepRecord) -> str:
        parts = [
            f"{_time_of_day()}  step {record.step}/{record.step + self._throughput.steps_left()}",
            *(self._speeds() if self._show_throughput else ()),
            f"loss {statistics.fmean(self._losses):.4f}",
            f"norm {record.gradient_norm:.3f}",
            f"rate {record.learning_rate:.3e}",
        ]
        parts += [f"{name} {loss:.2e}" for name, loss in record.extra_losses.items()]
        if record.loss_scale != 1.0:
            parts.append(f"scale {record.loss_scale:g}")
        if self._show_throughput:
            parts += [readable_bytes(record.memory_bytes), f"{readable_seconds(self._throughput.seconds_left())} left"]
        return "  ".join(parts)

    def _speeds(self) -> list[str]:
        throughput = self._throughput
        rate, usual, share = throughput.tokens_per_second(), throughput.usual(), throughput.utilization()
        trend = "" if usual is None else f" ({rate / usual - 1:+.0%})"
        found = [f"{1000 * throughput.step_seconds():.3g} ms/step", f"{readable_count(rate)} tokens/s{trend}"]
        found.append(
            f"{readable_count(throughput.flops_per_second())} FLOP/s" if share is None else f"{share:.1%} of peak"
        )
        found.append(f"data wait {throughput.share(lambda step: step.seconds.get('data', 0.0)):.1%}")
        if self._several:
            found.append(f"waits for ranks {throughput.share(lambda step: step.waiting_seconds):.1%}")
        return found

    def evaluated(self, record: EvaluationRecord) -> None:
        say(f"{_time_of_day()}  evaluation after step {record.step}: loss {record.loss:.4f}")
        for variant, cost in (record.retrieval.excess if record.retrieval else {}).items():
            say(f"  {variant} neighbours cost {cost} nats per token more than real ones")
        if record.alarms:
            alarm("this model does not use its neighbours:\n" + "\n".join(f"  - {words}" for words in record.alarms))

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        text = f"{event}: " + ", ".join(f"{name} {value}" for name, value in facts.items())
        if event in ALARMS:
            alarm(f"{_time_of_day()}  {text}")
        else:
            say(f"{_time_of_day()}  {text}")


def _without_saving(step: StepRecord) -> float:
    return step.step_seconds - step.seconds.get("save", 0.0)


def _rate(step: StepRecord) -> float:
    return step.positions / max(_without_saving(step), 1e-9)


def _time_of_day() -> str:
    return time.strftime("%m-%d %H:%M:%S")
