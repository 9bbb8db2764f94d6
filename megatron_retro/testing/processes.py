"""Runs a function on N forked gloo ranks, or in one fork that may be killed, as a preempted job is.

Ranks take a tenth of a second to start, give one traceback on failure, and never hang.

`run_ranks(function, 4, argument)` calls `function(argument)` in four processes that already share a default process
group, and returns their results in rank order. Closures work (the ranks are forks). The first failure in time is the
one that is raised, because the ranks that fail after it only lost their peer. What every rank prints goes where the
caller's output goes. Killing a rank on purpose belongs in the function: `os.kill(os.getpid(), signal.SIGKILL)`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining  # all three: once here, and not again in every fork
from torch._C._distributed_c10d import FileStore

from megatron_retro.errors import MegatronRetroError
from megatron_retro.runtime.strict_json import json_text

_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.01


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message carries its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 60.0,
    initialize: bool = True,
) -> list[Any]:
    """Call `function(*arguments)` on every rank; results in rank order.

    `initialize=False` leaves the process group to the function, which finds RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT as a launcher would set them.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        room = Path(name)
        port = _free_port() if not initialize else 0
        processes = {
            fork(partial(_rank_main, room, rank, world_size, port, timeout, lambda: function(*arguments))): rank
            for rank in range(world_size)
        }
        try:
            _wait(processes, room, timeout)
        finally:
            _kill(processes)
        return [torch.load(room / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank_main(room: Path, rank: int, world_size: int, port: int, timeout: float, call: Callable[[], Any]) -> None:
    with open(room / f"{rank}.stack", "w", encoding="utf-8") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks)
        try:
            if port:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
                os.environ.update({key: str(value) for key, value in names.items()})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            else:
                store = FileStore(str(room / "store"), world_size)
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
                )
            result = call()
            torch.save(result, room / f"{rank}.result")
            if dist.is_initialized():
                dist.barrier()  # nobody leaves while a peer still reads from it, or from the store in the first rank
        except BaseException:
            failure = {"at": time.time(), "traceback": traceback.format_exc()}
            (room / f"{rank}.part").write_text(json_text(failure), encoding="utf-8")
            (room / f"{rank}.part").rename(room / f"{rank}.failure")
            os._exit(1)


def _wait(processes: dict[int, int], room: Path, timeout: float) -> None:
    """Until all ranks are done; after the first failure the others get a moment, then the end."""
    deadline = time.monotonic() + timeout
    ended: dict[int, int] = {}
    while len(ended) < len(processes):
        for process, rank in processes.items():
            if rank not in ended and os.waitpid(process, os.WNOHANG)[0]:
                ended[rank] = len(ended)
        died = [rank for rank in ended if not (room / f"{rank}.result").exists()]
        if died:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if not any((room / f"{rank}.failure").exists() for rank in died) or len(ended) == len(processes):
                break
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    _raise_first(processes, room, ended, timeout)


def _raise_first(processes: dict[int, int], room: Path, ended: dict[int, int], timeout: float) -> None:
    failures = {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in room.glob("*.failure")}
    silent = [rank for rank in ended if rank not in failures and not (room / f"{rank}.result").exists()]
    if silent:
        raise RankFailure(f"rank {silent[0]} of {len(processes)} died without a word (killed?)")
    if failures:
        rank = min(failures, key=lambda failed: failures[failed]["at"])
        raise RankFailure(f"rank {rank} of {len(processes)} failed:\n{failures[rank]['traceback']}")
    hung = [rank for rank in processes.values() if rank not in ended]
    if hung:
        raise RankFailure(f"ranks {hung} of {len(processes)} did not end in {timeout:g} s:\n{_stacks(processes, room)}")


def _stacks(processes: dict[int, int], room: Path) -> str:
    for process in processes:
        _signal(process, signal.SIGUSR2)
    time.sleep(0.2)
    texts = {rank: (room / f"{rank}.stack").read_text(encoding="utf-8") for rank in processes.values()}
    return "\n".join(f"--- rank {rank}\n{text}" for rank, text in texts.items() if text)


def _kill(processes: dict[int, int]) -> None:
    for process in processes:
        if _signal(process, signal.SIGKILL):
            os.waitpid(process, 0)


def _signal(process: int, number: signal.Signals) -> bool:
    """Whether the process was still there (a child that was waited for is not)."""
    try:
        done, _ = os.waitpid(process, os.WNOHANG)
    except ChildProcessError:
        return False
    if done:
        return False
    os.kill(process, number)
    return True


def tree_memory_mb(process: int) -> float:
    """Memory of a process and its descendants, shared pages counted once."""
    total = 0.0
    pending = [process]
    while pending:
        number = pending.pop()
        try:
            lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
            pending += [int(word) for word in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
        except (OSError, StopIteration):
            continue
    return total


def settle_autograd() -> None:
    """Let autograd count the GPUs of a process that has none, before anything else of it uses torch.

    It counts them at its first backward and starts threads for them, after which no fork computes gradients. Where
    torch is built for CUDA and there is no GPU, a FakeTensorMode (DTensor enters one) makes torch pretend to have some.
    """
    if torch.cuda.device_count() == 0:
        torch.zeros((), requires_grad=True).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _autograd_has_threads() -> bool:
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            if name.read_text().startswith("pt_autograd_"):
                return True
    return False


def fork(function: Callable[[], object]) -> int:
    """Start a child that calls the function and exits with 0, with the code of a named error, or with 1."""
    if _autograd_has_threads():
        raise RankFailure(
            "autograd has threads for GPUs here, so a fork computes no gradients: hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= and call settle_autograd() when the process begins"
        )
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
