"""The loop: load, step, observe, evaluate, save, stop?

Everything is built elsewhere and handed in. What is measured goes to observers as frozen records; with all of them
removed a run computes the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_retro.assembly.parallel_model import StepResult
from megatron_retro.assembly.run_parts import RunParts
from megatron_retro.checkpoint.training_state import TrainingState
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, TrainingConfig
from megatron_retro.errors import DataError, DistributedError
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.optim.optimizer import Update
from megatron_retro.parallel.mesh import DATA
from megatron_retro.runtime.heartbeat import Heartbeat
from megatron_retro.runtime.process_group import explain_failure
from megatron_retro.runtime.run_records import RunFacts, StepRecord
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.training.bad_steps import non_finite_reason, sample_ids, spike_limit, spike_reason, write_bad_batch
from megatron_retro.training.checkpoints import RunCheckpoints
from megatron_retro.training.clock import Clock
from megatron_retro.training.evaluator import Evaluator
from megatron_retro.training.observers import Observer


class Ending(Enum):
    """How a call of `run` came to its end."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Outcome:
    """How the run ended, and why if it did not finish."""

    ending: Ending
    reason: str = ""


@dataclass(frozen=True)
class _Verdict:
    """A step's numbers, and what all ranks think of it: whether they are finite, and why it must not count."""

    loss: float
    num_tokens: float
    squared_norm: float
    finite: bool
    reason: str | None


class Trainer:
    """One run. Every rank has one and calls `run`."""

    def __init__(
        self,
        parts: RunParts,
        facts: RunFacts,
        state: TrainingState,
        checkpoints: RunCheckpoints,
        evaluator: Evaluator | None,
        observer: Observer,
        stops: StopRequests,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.parts, self.facts, self.state = parts, facts, state
        self._checkpoints, self._evaluator = checkpoints, evaluator
        self._observer, self._stops = observer, stops
        self._settings: Settings = parts.settings
        self._training = self._settings[TrainingConfig]
        self._heartbeat = heartbeat
        self._stop_wish: str | None = None
        self._clock = Clock(self._note)

    def run(self) -> Outcome:
        """Train until the last sample, or until something asks to stop; the state is saved either way.

        When a collective fails because a rank died or hangs, the error names that rank.
        """
        try:
            with self._clock.counting_waits():
                return self._run()
        except RuntimeError as error:
            lost = explain_failure(error, self.state.step + 1)
            if lost is None:
                raise
            raise self._blamed(lost) from error
        except DistributedError as error:
            raise self._blamed(error) from error

    def _blamed(self, error: DistributedError) -> DistributedError:
        if self._heartbeat is None:
            return error
        found, step = self._heartbeat.blame(), self.state.step + 1
        self._heartbeat.write(found, step)
        self._observer.happened("lost rank", {"step": step, "culprit": found.words})
        return type(error)(
            f"{error.what}: {found.words}",
            got=error.got,
            expected=error.expected,
            fix="the same command goes on from the newest checkpoint (torchrun --max-restarts does it by itself)",
        )

    def _note(self, phase: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.note(self.state.step + 1, phase)

    def _run(self) -> Outcome:
        self._observer.started(self.facts, self.state.step)
        if self._finished():
            facts = {"samples": self.state.samples, "asked for": self.parts.total_samples}
            self._observer.happened("nothing left to train", facts)
        self._clock.lap()
        reason = None
        while not self._finished() and reason is None:
            batches = self._load()
            record = self._step(batches)
            if record is not None:
                self._observer.stepped(record)
                self._evaluate_if_due()
                self._save_if_due()
            reason = self._stop_reason()
        if reason is None:
            self._evaluate_at_end()
        self._save_at_end()
        return Outcome(Ending.FINISHED) if reason is None else Outcome(Ending.STOPPED, reason)

    def _finished(self) -> bool:
        return self.state.samples >= self.parts.total_samples

    def _load(self) -> list[Microbatch[Array]]:
        with self._clock.phase("data"):
            return next(self.parts.loader)

    def _step(self, batches: Sequence[Microbatch[Array]]) -> StepRecord | None:
        """One step; None for one that is known to be bad and passed over."""
        state, parts = self.state, self.parts
        first_sample = state.samples
        batch_size = parts.loader.consumed_samples - first_sample
        state.samples = parts.loader.consumed_samples
        if first_sample in state.bad_samples:
            return None
        with self._clock.phase("forward_backward"):
            tensors = [batch.to(parts.model.device) for batch in batches]
            scale = parts.optimizer.loss_scale.scale
            result = parts.model.train_step(tensors, loss_scale=scale, step=state.step)
        with self._clock.phase("save"):
            self._checkpoints.before_update()
        with self._clock.phase("optimizer"):
            verdict = self._verdict(result, parts.model.squared_gradient_norm())
            update = parts.optimizer.update(
                verdict.squared_norm,
                parts.schedule.at(state.samples),
                finite=verdict.finite,
                acceptable=verdict.reason is None,
            )
        if verdict.reason is not None and not _is_overflow(verdict, update):
            self._bad_step(batches, first_sample, verdict.reason)
            return None
        state.step += 1
        state.tokens += int(verdict.num_tokens)
        if update.applied:
            state.bad_in_a_row = 0
            state.recent_losses.append(verdict.loss)
        lap = self._clock.lap()
        return StepRecord(
            step=state.step,
            samples=state.samples,
            tokens=state.tokens,
            batch_size=batch_size,
            positions=sum(batch.tokens_BS.size for batch in batches) * parts.model.mesh.size(DATA),
            loss=verdict.loss,
            gradient_norm=update.gradient_norm,
            learning_rate=update.learning_rate,
            applied=update.applied,
            clipped=update.clipped,
            loss_scale=update.loss_scale,
            extra_losses=result.extra_losses,
            seconds=lap.seconds,
            memory_bytes=_memory_bytes(parts.model.device),
            waiting_seconds=lap.waiting,
        )

    def _verdict(self, result: StepResult, squared_norm: Tensor) -> _Verdict:
        """The step's numbers and whether it may count, the same on every rank: what one rank finds, all are told.

        The numbers stay on the device until all ranks have agreed there; the host waits for them once.
        """
        device, mine = squared_norm.device, self._stops.reason()
        sums = (torch.as_tensor(value, dtype=torch.float64) for value in (result.loss_sum, result.num_tokens))
        loss_sum, num_tokens = (value.to(device) for value in sums)
        loss = loss_sum / num_tokens.clamp(min=1.0)
        recent, factor = self.state.recent_losses, self._training.loss_spike_factor
        broken = ~(loss.isfinite() & squared_norm.isfinite())
        stop = torch.full_like(broken, mine is not None)
        flags = torch.stack([broken, loss > spike_limit(recent, factor), stop]).double()
        if self.facts.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        numbers = torch.cat([torch.stack([loss, num_tokens, squared_norm.double()]), flags]).tolist()
        any_broken, any_spike, any_stop = map(bool, numbers[3:])
        self._stop_wish = (mine or "another rank was asked to stop") if any_stop else None
        reason = None
        if any_broken:
            norm = math.sqrt(numbers[2]) if math.isfinite(numbers[2]) else math.inf
            reason = non_finite_reason(numbers[0], norm) or "another rank's gradient is not finite"
        elif any_spike:
            reason = spike_reason(numbers[0], recent, factor) or "another rank's loss is a spike"
        return _Verdict(numbers[0], numbers[1], numbers[2], not any_broken, reason)

    def _bad_step(self, batches: Sequence[Microbatch[Array]], first_sample: int, reason: str) -> None:
        """Name and keep the batch, then do what the policy says. Every rank comes here together."""
        state = self.state
        state.bad_in_a_row += 1
        state.skipped_steps += 1
        state.bad_samples.add(first_sample)
        bad_in_a_row = state.bad_in_a_row
        if self._checkpoints.run is not None:
            write_bad_batch(self._checkpoints.run, self.facts.rank, state.step + 1, first_sample, reason, batches)
        facts = {"step": state.step + 1, "reason": reason, "policy": self._training.non_finite_policy}
        self._observer.happened("bad step", {**facts, "samples": self._global_samples(first_sample, batches)})
        if self._training.non_finite_policy == "stop" or bad_in_a_row >= self._training.max_bad_steps:
            raise DataError(
                f"training stopped at step {state.step + 1}: {reason}",
                got=f"samples {self._global_samples(first_sample, batches)}, bad steps in a row: {bad_in_a_row}",
                fix="look at the batch under bad_batches/ of the run; lower --lr, or raise --max-bad-steps",
            )
        if self._training.non_finite_policy == "rollback":
            self._roll_back(bad_in_a_row)
        self._clock.lap()

    def _global_samples(self, first_sample: int, batches: Sequence[Microbatch[Array]]) -> str:
        ids = sample_ids(batches)
        return f"{first_sample} to {self.state.samples - 1} (this rank: {ids[0]} to {ids[-1]})"

    def _roll_back(self, bad_in_a_row: int) -> None:
        """Take up the newest checkpoint; the samples of bad steps are passed over when the run meets them again."""
        if self._checkpoints.roll_back():
            self.state.bad_in_a_row = bad_in_a_row
            self._observer.happened("rollback", {"to step": self.state.step})
        else:
            self._observer.happened("rollback", {"to step": "none: there is no checkpoint yet, the step is skipped"})

    def _evaluate_if_due(self) -> None:
        interval = self._training.eval_interval
        if interval and self.state.step % interval == 0 and not self._finished():
            self._evaluate()

    def _evaluate_at_end(self) -> None:
        if self.state.last_evaluation.get("step") != self.state.step:
            self._evaluate()

    def _evaluate(self) -> None:
        if self._evaluator is not None:
            record = self._evaluator.evaluate(self.state.step)
            self.state.last_evaluation = {"step": self.state.step}
            if record is not None:  # the first rank: it also writes the state
                self.state.last_evaluation["loss"] = record.loss
                self._observer.evaluated(record)
            self._clock.lap()

    def _save_if_due(self) -> None:
        config = self._settings[CheckpointConfig]
        if config.save_interval and self.state.step % config.save_interval == 0 and not self._finished():
            with self._clock.phase("save"):
                self._checkpoints.save(in_background=config.async_save)

    def _save_at_end(self) -> None:
        """The final state; a save in the background is waited for first."""
        if self._checkpoints.can_save:
            self._checkpoints.save(in_background=False)

    def _stop_reason(self) -> str | None:
        """Why all ranks stop now; a rank's signal or time limit is heard of by all within one step."""
        if self._finished():
            return None
        interval = self._training.exit_interval
        if interval and self.state.step and self.state.step % interval == 0:
            return f"--exit-interval {interval}"
        return self._stop_wish


def _memory_bytes(device: torch.device) -> int:
    """Memory that this process holds: the device's peak, or the resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * 4096


def _is_overflow(verdict: _Verdict, update: Update) -> bool:
    """fp16 gradients that overflow at the present scale are the scale's fault, not the batch's."""
    return not verdict.finite and math.isfinite(verdict.loss) and update.loss_scale > 1.0
