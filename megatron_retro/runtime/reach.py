"""`reach`: do the processes of this job meet, over the network that training would use?"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_retro.errors import DistributedError
from megatron_retro.runtime.console import say
from megatron_retro.runtime.launch import find_launch
from megatron_retro.runtime.process_group import process_group

_TIMEOUT_MINUTES = 2.0


def reach() -> None:
    """Every process meets the others and adds one number; a wrong or missing sum is an error."""
    launch = find_launch()
    with process_group(launch, timeout_minutes=_TIMEOUT_MINUTES) as device:
        total = torch.ones(1, device=device)
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise DistributedError(
                f"rank {launch.rank} of {launch.world_size} met the others but cannot exchange data with them",
                got=str(error).splitlines()[0],
                expected="an all-reduce over every rank",
                fix="check the interfaces that NCCL_SOCKET_IFNAME and NCCL_IB_HCA name, and the fabric of this node",
            ) from error
        if total.item() != launch.world_size:
            raise DistributedError("a sum over the ranks is wrong", got=total.item(), expected=launch.world_size)
    if launch.rank == 0:
        say(f"{launch.world_size} processes reach each other")
