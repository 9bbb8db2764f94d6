"""A pool of worker processes hands a request to stop to all of them, whenever it comes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_retro.data.preprocessing.pool import Send, WorkerPool
from megatron_retro.errors import Requeue
from megatron_retro.runtime.signals import until_stopped


def stopped(work_seconds: float, pool: WorkerPool) -> None:
    timer = threading.Timer(work_seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(Requeue):
        pool.run()
    timer.join()


def test_a_worker_that_has_just_begun_hears_a_stop(tmp_path: Path) -> None:
    def work(number: int, send: Send) -> None:
        time.sleep(1.5)  # it listens behind its imports
        for block in until_stopped(iter(range(40))):
            (tmp_path / str(block)).touch()
            time.sleep(0.1)

    stopped(0.2, WorkerPool(1, work, print, str))
    assert len(list(tmp_path.iterdir())) < 40


def test_no_worker_takes_the_place_of_one_that_dies_after_a_stop(tmp_path: Path) -> None:
    def work(number: int, send: Send) -> None:
        (tmp_path / str(os.getpid())).touch()
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        time.sleep(5)

    stopped(0.5, WorkerPool(1, work, print, str))
    assert len(list(tmp_path.iterdir())) == 1
