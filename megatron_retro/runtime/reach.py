"""`reach`: do the processes of this job meet, over the network that training would use, and how fast is each link?"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_retro.errors import DistributedError
from megatron_retro.runtime.console import say, warn
from megatron_retro.runtime.launch import find_launch
from megatron_retro.runtime.process_group import new_group, process_group

_TIMEOUT_MINUTES = 2.0
_REPEATS = 3
_BYTES = {"cuda": 1 << 28, "cpu": 1 << 20}
SLOWER = 0.5  # of the median rate: such a link is named


def reach() -> None:
    """Every process meets the others and adds one number; then neighbours add much. A slow pair is named."""
    launch = find_launch()
    with process_group(launch, timeout_minutes=_TIMEOUT_MINUTES) as device:
        total = torch.ones(1, device=device)
        try:
            dist.all_reduce(total)
            rates = _rates_of_neighbors(device)
        except RuntimeError as error:
            raise DistributedError(
                f"rank {launch.rank} of {launch.world_size} met the others but cannot exchange data with them",
                got=str(error).splitlines()[0],
                expected="an all-reduce over every rank",
                fix="check the interfaces that NCCL_SOCKET_IFNAME and NCCL_IB_HCA name, and the fabric of this node",
            ) from error
        if total.item() != launch.world_size:
            raise DistributedError("a sum over the ranks is wrong", got=total.item(), expected=launch.world_size)
        hosts: list[str] = [""] * launch.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        for sentence in slow_pairs(rates, hosts):
            warn(sentence)
    if launch.rank == 0:
        speed = f", neighbours at {statistics.median(rates):.3g} GB/s" if rates else ""
        say(f"{launch.world_size} processes reach each other{speed}")


def slow_pairs(rates: Sequence[float], hosts: Sequence[str]) -> list[str]:
    """Sentences about pairs (rank r and r + 1) far below the median; two of one node name it."""
    usual = statistics.median(rates) if len(rates) > 1 else 0.0
    return [
        f"slow link: ranks {rank} and {rank + 1} ({hosts[rank]}, {hosts[rank + 1]}) exchange {rate:.3g} GB/s, "
        f"the median is {usual:.3g}"
        for rank, rate in enumerate(rates)
        if rate < SLOWER * usual
    ]


def _rates_of_neighbors(device: torch.device) -> list[float]:
    """GB/s of an all-reduce of ranks r and r + 1, for each r; half of the pairs at a time. Every rank calls it."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mine = torch.zeros(max(world_size - 1, 1), dtype=torch.float64, device=device)
    data = torch.zeros(_BYTES[device.type] // 4, device=device)
    for first in (0, 1):
        groups = {left: new_group([left, left + 1]) for left in range(first, world_size - 1, 2)}
        left = rank - (rank - first) % 2
        if left in groups:
            seconds = [_seconds(data, groups[left]) for _ in range(_REPEATS)]
            mine[left] = data.nbytes / min(seconds) / 1e9
        dist.barrier()
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return [float(rate) for rate in mine.tolist()[: world_size - 1]]


def _seconds(data: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    start = time.perf_counter()
    dist.all_reduce(data, group=group)
    if data.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
