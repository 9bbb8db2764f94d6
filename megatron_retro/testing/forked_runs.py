"""Runs a function in a fork that may be killed: what a preempted job looks like from outside."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

from megatron_retro.errors import MegatronRetroError


def fork(function: Callable[[], object]) -> int:
    """Start a child that calls the function and exits with 0, with the code of a named error, or with 1."""
    gc.collect()
    process = os.fork()
    if process:
        return process
    gc.freeze()  # collecting what the parent left (process groups, say) would wait for threads that are not here
    code = 1
    try:
        torch.set_num_threads(1)
        function()
        code = 0
    except MegatronRetroError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the parent's may be cleaned up here


def wait(process: int, seconds: float | None = None) -> int | None:
    """Exit code of a child (negative: the signal that killed it); None if it still runs after `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def exit_code_of(function: Callable[[], object]) -> int:
    """Exit code of the function in a child."""
    code = wait(fork(function))
    assert code is not None
    return code


def kill_until_done(function: Callable[[], object], kills: int, longest_seconds: float, seed: int) -> int:
    """Run again and again, killed at a random moment up to `kills` times; returns how many kills hit it alive."""
    draw = random.Random(seed)
    hits = 0
    for _ in range(kills):
        process = fork(function)
        code = wait(process, draw.uniform(0.0, longest_seconds))
        if code is None:
            os.kill(process, signal.SIGKILL)
            hits += wait(process) == -signal.SIGKILL
        elif code != 0:
            raise AssertionError(f"the run failed by itself with exit code {code}")
        else:
            return hits
    code = exit_code_of(function)
    if code != 0:
        raise AssertionError(f"the last run failed with exit code {code}")
    return hits
