"""Megatron core in a process without a GPU: what it asks one for, without looking whether there is one, is given."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch._C._distributed_c10d import HashStore


def core_without_a_gpu() -> None:
    """One process of one rank, once; nothing is dropped, and there is no generator of a GPU to fork."""
    if torch.distributed.is_initialized():
        return
    torch.cuda.synchronize = lambda *_, **__: None  # nothing runs beside the process
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]  # core puts it where a device goes
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state, utils
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from packaging.version import Version

    utils._te_version = Version("1.2")  # its Retro asks for the version of what is not there
    CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()  # no GPU has a state
    parallel_state.initialize_model_parallel()
