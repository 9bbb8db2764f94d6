"""A long run with a fault about every 50 steps: how much is repeated, how fast it is back, whether a bit differs.

Faults are kills, SIGTERM, and NaN gradients (which both runs meet at the same samples: one passes them over, the other
rolls back). A killed process loses nothing that the kernel has, so the runs may live in memory: what a disk costs is
measured by `benchmarks/training.py`.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_retro.assembly.parallel_model import ParallelModel, StepResult
from megatron_retro.config.settings import Settings
from megatron_retro.data.loader import Loader
from megatron_retro.ops.local_tensors import local
from megatron_retro.runtime.console import say
from megatron_retro.runtime.run_log import EVENTS
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main
from megatron_retro.testing.processes import exit_code_of, fork, wait
from megatron_retro.testing.tiny_corpus import TinyCorpus, differences, write_tiny_corpus
from megatron_retro.training.program import pretrain

STEPS_PER_FAULT = 50
STEPS_PER_NAN = 10 * STEPS_PER_FAULT  # every tenth fault
TERMINATED_SHARE = 0.25  # of the others
REQUEUE = 75
_MEMORY = Path("/dev/shm")


def run(quick: bool) -> list[Figure]:
    """The soak."""
    steps = 600 if quick else 10_000
    place = os.environ.get("BENCHMARK_DIR", _MEMORY if _MEMORY.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=place) as name:
        room = Path(name)
        corpus = write_tiny_corpus(room / "corpus")
        whole = settings_of(corpus, room / "whole", steps, non_finite_policy="skip")
        broken = settings_of(
            corpus, room / "broken", steps, non_finite_policy="rollback", save_interval=1, async_save=True
        )
        if exit_code_of(lambda: train_with_nans(whole)) != 0:
            raise AssertionError("the unbroken run failed")
        soak = Soak(lambda: train_with_nans(broken), room / "broken" / EVENTS)
        soak.run()
        useful = Events(room / "whole" / EVENTS).steps_so_far()
        executed = soak.events.steps_so_far()
        unequal = differences(room / "whole", room / "broken")
        if unequal:
            say(f"not bit-equal: {', '.join(unequal)}")
    nans = steps // STEPS_PER_NAN
    faults = f"{steps} steps, {soak.kills} kills, {soak.terminations} SIGTERM, {nans} NaN"
    return [
        Figure(f"repeated share of the executed steps ({faults})", 1 - useful / executed, "", 0.03, LOWER),
        Figure("tensors that differ from the unbroken run's", float(len(unequal)), "", 0.0, LOWER),
        Figure("time from a kill to the next step", statistics.median(soak.after_kills), "s"),
        Figure("time from SIGTERM, save included, to the next step", statistics.median(soak.after_terminations), "s"),
    ]


def settings_of(corpus: TinyCorpus, run: Path, steps: int, **more: Any) -> Settings:
    """The smallest Retro, one sample a step."""
    return corpus.settings(
        save=str(run), train_iters=steps, num_layers=1, retro_layers=[1], hidden_size=16, retro_encoder_layers=1,
        retro_encoder_hidden_size=16, micro_batch_size=1, global_batch_size=1, eval_iters=0, lr=1e-3,
        hidden_dropout=0.1, log_interval=1 << 30, **more,
    )  # fmt: skip


def train_with_nans(settings: Settings) -> None:
    """Train; one gradient of one in `STEPS_PER_NAN` samples is not a number, whenever that sample comes."""
    read, train_step = Loader.__next__, ParallelModel.train_step
    samples: list[int] = []

    def remembering(self: Loader) -> Any:
        samples[:] = [self.consumed_samples]
        return read(self)

    def step(self: ParallelModel, microbatches: Any, **more: Any) -> StepResult:
        result = train_step(self, microbatches, **more)
        if samples[0] % STEPS_PER_NAN == STEPS_PER_NAN // 2:
            gradient = next(parameter.grad for parameter in self.module.parameters() if parameter.grad is not None)
            local(gradient).reshape(-1)[0] = float("nan")
        return result

    Loader.__next__, ParallelModel.train_step = remembering, step  # type: ignore[method-assign]
    pretrain(settings)


class Events:
    """Counts the steps in a log that grows, reading every byte once."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._steps = path, 0, 0

    def steps_so_far(self) -> int:
        """Steps that were executed, repeats included."""
        if self._path.exists():
            with self._path.open("rb") as stream:
                stream.seek(self._position)
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._position += len(whole)
            self._steps += whole.count(b'{"event": "step"')
        return self._steps


@dataclass
class Soak:
    """Starts a run again and again until it ends by itself, and disturbs it."""

    train: Callable[[], object]
    log: Path
    kills: int = 0
    terminations: int = 0
    after_kills: list[float] = field(default_factory=list)
    after_terminations: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Until the last step; a run that ends in any way that was not asked for is an error."""
        self.events = Events(self.log)
        draw = random.Random(0)
        delays: list[float] | None = None
        disturbed = 0.0
        while True:
            process = fork(self.train)
            before = self.events.steps_so_far()
            if not self._reached(process, before + 1):
                self._require_end(process)
                return
            if delays is not None:
                delays.append(time.monotonic() - disturbed)
            if not self._reached(process, before + draw.randint(STEPS_PER_FAULT // 2, 3 * STEPS_PER_FAULT // 2)):
                self._require_end(process)
                return
            time.sleep(draw.uniform(0.0, 0.02))
            terminates = draw.random() < TERMINATED_SHARE
            disturbed = time.monotonic()
            os.kill(process, signal.SIGTERM if terminates else signal.SIGKILL)
            code = wait(process)
            if code == 0:
                return
            if code != (REQUEUE if terminates else -signal.SIGKILL):
                raise AssertionError(f"the run ended with exit code {code}")
            delays = self.after_terminations if terminates else self.after_kills
            self.terminations += terminates
            self.kills += not terminates

    def _reached(self, process: int, steps: int) -> bool:
        """Wait until so many steps are in the log; False when the process ended before."""
        while self.events.steps_so_far() < steps:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
            time.sleep(0.005)
        return True

    def _require_end(self, process: int) -> None:
        code = wait(process)
        if code != 0:
            raise AssertionError(f"the run failed by itself with exit code {code}")


if __name__ == "__main__":
    benchmark_main(__doc__, run)
