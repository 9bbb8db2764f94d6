"""A long run that is killed about every 50 steps: how much is repeated, how fast it is back, whether a bit differs."""

from __future__ import annotations

import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_retro.runtime.events import read_events
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main
from megatron_retro.testing.forked_runs import exit_code_of, fork, wait
from megatron_retro.testing.run_results import differences
from megatron_retro.testing.tiny_corpus import write_tiny_corpus
from megatron_retro.training.program import pretrain

STEPS_PER_FAULT = 50


def run(quick: bool) -> list[Figure]:
    """The soak."""
    steps = 500 if quick else 10_000
    with tempfile.TemporaryDirectory(prefix="soak-", dir=os.environ.get("BENCHMARK_DIR")) as name:
        room = Path(name)
        corpus = write_tiny_corpus(room / "corpus")
        common: dict[str, Any] = {"train_iters": steps, "eval_iters": 0, "lr": 1e-3, "log_interval": 1 << 30}
        if exit_code_of(lambda: pretrain(corpus.settings(save=str(room / "whole"), **common))) != 0:
            raise AssertionError("the unbroken run failed")
        settings = corpus.settings(save=str(room / "killed"), save_interval=1, async_save=True, **common)
        events = room / "killed/events.jsonl"
        draw, faults, delays = random.Random(0), 0, []
        while True:
            process = fork(lambda: pretrain(settings))
            started, done_before = time.monotonic(), count_steps(events)
            target = done_before + draw.randint(STEPS_PER_FAULT // 2, 3 * STEPS_PER_FAULT // 2)
            came_back = False
            while (code := wait(process, 0.01)) is None:
                done = count_steps(events)
                if done > done_before and not came_back:
                    came_back = True
                    delays.append(time.monotonic() - started)
                if done >= target:
                    os.kill(process, signal.SIGKILL)
                    code = wait(process)
                    break
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise AssertionError(f"the run failed by itself with exit code {code}")
            faults += 1
        executed = count_steps(events)
        unequal = differences(room / "whole", room / "killed")
    return [
        Figure(
            f"repeated share of executed steps ({steps} steps, {faults} kills)", 1 - steps / executed, "", 0.03, LOWER
        ),
        Figure("tensors that differ from the unbroken run's", float(len(unequal)), "", 0.0, LOWER),
        Figure("time from fault to next step", statistics.median(delays), "s"),
    ]


def count_steps(events: Path) -> int:
    """Steps that were executed, repeats included."""
    return sum(1 for _ in read_events(events, "step")) if events.exists() else 0


if __name__ == "__main__":
    benchmark_main(__doc__, run)
