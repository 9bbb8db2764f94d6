"""The helper that the distributed tests stand on: results, first failure, death, hang, closures, autograd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_retro.testing.processes import RankFailure, run_ranks


def test_results_come_in_rank_order_and_ranks_can_talk() -> None:
    offset = 10

    def total() -> tuple[int, torch.Tensor]:
        value = torch.tensor([dist.get_rank() + offset])
        dist.all_reduce(value)
        return dist.get_rank(), value

    results = run_ranks(total, 3)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(value.item() == 33 for _, value in results)


def test_first_failure_in_time_is_raised_not_its_consequence() -> None:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise ValueError("the real fault")
        dist.barrier()

    with pytest.raises(RankFailure, match=r"rank 1 of 3 failed(.|\n)*the real fault"):
        run_ranks(fail, 3)


def test_killed_rank_is_named() -> None:
    def die() -> None:
        if dist.get_rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RankFailure, match="rank 2 of 3 died without a word"):
        run_ranks(die, 3)


def test_hang_ends_with_the_stacks_of_those_that_hang() -> None:
    def sleep_for_long() -> None:
        if dist.get_rank() == 0:
            time.sleep(100)

    with pytest.raises(RankFailure, match=r"did not end in 5 s(.|\n)*sleep_for_long"):
        run_ranks(sleep_for_long, 2, timeout=5.0)


def test_backward_works_in_ranks_after_backward_in_the_parent() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    (weight @ weight).sum().backward()

    def gradient() -> float:
        local = torch.full((3,), float(dist.get_rank() + 1), requires_grad=True)
        (local * local).sum().backward()
        assert local.grad is not None
        return float(local.grad[0])

    assert run_ranks(gradient, 2) == [2.0, 4.0]


PRETENDED = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megatron_retro.testing.processes import exit_code_of, settle_autograd

settle_autograd()
with FakeTensorMode():
    torch.empty(2)

def gradient():
    torch.ones(2, requires_grad=True).sum().backward()

gradient()
raise SystemExit(exit_code_of(gradient))
"""


def test_gradients_in_a_fork_of_a_process_whose_torch_pretended_to_have_gpus() -> None:
    """Of a torch that is built for CUDA, on a machine without a GPU."""
    subprocess.run([sys.executable, "-c", PRETENDED], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_a_fork_beside_threads_for_gpus_is_refused() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    Path(f"/proc/self/task/{thread.native_id}/comm").write_text("pt_autograd_0")
    try:
        with pytest.raises(RankFailure, match="threads for GPUs"):
            run_ranks(dist.get_rank, 1)
    finally:
        done.set()
        thread.join()


def test_a_function_may_start_its_own_group_from_launcher_variables() -> None:
    def start() -> int:
        dist.init_process_group("gloo")
        return dist.get_world_size()

    assert run_ranks(start, 2, initialize=False) == [2, 2]
