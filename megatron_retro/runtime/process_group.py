"""Starts and ends torch's process group, the same way for every launcher: gloo on CPUs, NCCL on GPUs.

A program opens it once:

    with process_group(find_launch(), timeout_minutes=10) as device: ...

A lone process gets a group of one, so nothing behind it asks whether it is distributed. Every collective has a
timeout; `agree` compares facts between ranks before the first step; `explain_failure` turns what torch raises when a
peer died or hangs into an error that names rank, axis and step. What one rank refuses, all ranks refuse in its words.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import traceback
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from megatron_retro.errors import DistributedError, EnvironmentProblem, LostRank, MegatronRetroError
from megatron_retro.runtime.console import show_error
from megatron_retro.runtime.flight_recorder import FILE_START
from megatron_retro.runtime.launch import Launch
from megatron_retro.runtime.refusals import Refusals
from megatron_retro.runtime.rendezvous import store_of
from megatron_retro.runtime.store_calls import StoreCalls
from megatron_retro.runtime.strict_json import json_text

_RECORDED_COLLECTIVES = 2000
_TOLD_BY_TORCH = 1.0  # seconds in which torch's own timeout, which names what it waited for, comes first
_SIGNS_OF_LOST_PEERS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe", "aborted")


def choose_device(launch: Launch, *, use_gpu: bool | None = None) -> torch.device:
    """This rank's device: its own GPU where there are GPUs, else the CPU."""
    available = torch.cuda.is_available()
    if use_gpu is False or not available:
        if use_gpu:
            raise EnvironmentProblem(
                "a GPU was asked for and torch sees none", fix="megatron-retro environment says why"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launch.local_world_size > count and count > 1:
        raise EnvironmentProblem(
            "more ranks than GPUs on this host",
            got=f"{launch.local_world_size} ranks, {count} GPUs",
            expected="at most one rank for each GPU",
        )
    # a launcher that gives each rank its own CUDA_VISIBLE_DEVICES shows one GPU to each
    device = torch.device("cuda", launch.local_rank % count)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(
    launch: Launch, *, timeout_minutes: float = 10.0, use_gpu: bool | None = None, flights: Path | None = None
) -> Iterator[torch.device]:
    """The default process group for the length of the block; yields this rank's device.

    NCCL's flight recorder writes into `flights`. Named errors are shown here, while the groups are still there: NCCL
    may end the process while they are destroyed.
    """
    device = choose_device(launch, use_gpu=use_gpu)
    if device.type == "cuda":
        _record_flights(flights)
    store = _initialize(launch, device, timedelta(minutes=timeout_minutes))
    refusals = None if store is None else Refusals(store, launch.rank, launch.world_size)
    try:
        with warnings.catch_warnings():
            if launch.rank:  # libraries warn all ranks alike; the first one shows it
                warnings.simplefilter("ignore")
            yield device
    except Exception as error:
        refused = refusals.settle(error, _drop_connections) if refusals is not None else None
        raised = error if refused is None else refused
        if isinstance(raised, MegatronRetroError) and not launch.alone:
            show_error(raised)
        if refused is None:
            raise
        raise refused from error
    finally:
        end_process_group()


def _record_flights(folder: Path | None) -> None:
    """What NCCL writes of the newest collectives when one does not end; what the user set stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_RECORDED_COLLECTIVES))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if folder is not None:
        with contextlib.suppress(OSError):  # whoever writes the run's directory says so
            folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.absolute() / FILE_START))


def end_process_group() -> None:
    """Destroy the default group, and what torch keeps of layouts over it.

    Meshes are equal when they name the same ranks, so a later group would get tensors that point to this one's groups.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:  # a check of the network needs none, and would import it to leave
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _drop_connections() -> None:
    """Close this rank's connections without a word; `destroy_process_group` leaves them open while anyone holds one."""
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def _initialize(launch: Launch, device: torch.device, timeout: timedelta) -> Store | None:
    """Open the default group; the store in which its ranks met, None for a process that is alone."""
    # gloo connects two ranks when they first talk; else every group opens a socket from each rank to each other
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    place: dict[str, Any] = {"rank": launch.rank, "world_size": launch.world_size, "timeout": timeout}
    if launch.alone:
        dist.init_process_group(backend, store=HashStore(), **place)
        return None

    def meet() -> None:
        dist.init_process_group(backend, store=store, **place)
        dist.all_reduce(torch.zeros(1))  # a first rank that leaves at once takes the store from nobody still connecting

    call = StoreCalls(timeout.total_seconds() + _TOLD_BY_TORCH)
    try:
        store = call(lambda: store_of(launch, timeout))
        call(meet)
        return store
    except (RuntimeError, ValueError) as error:
        raise LostRank(
            f"rank {launch.rank} of {launch.world_size} on {socket.gethostname()} could not meet the others",
            got=str(error).splitlines()[0],
            expected=f"every rank at {launch.master_address}:{launch.master_port} (told by {launch.launcher})",
            fix="set MASTER_ADDR and MASTER_PORT to an address that every host reaches (torchrun on one host: "
            "--standalone)",
        ) from error


def new_group(ranks: Sequence[int] | None = None, **options: Any) -> dist.ProcessGroup:
    """A group of some ranks, or of all; every rank calls it, and only members may use it."""
    return cast(dist.ProcessGroup, dist.new_group(ranks, **options))  # else a number of torch's for "not a member"


def most_sockets(world_size: int) -> int:
    """What a rank holds open at most, NCCL's aside: gloo's neighbours on a ring, one rank each way for every power of
    two below, and to the store the default group's, the heartbeat's and the checkpoints' connections."""
    return 2 * math.ceil(math.log2(world_size)) + 3 if world_size > 1 else 0


def agree(facts: Mapping[str, object], what: str) -> None:
    """Every rank calls it at start: refuse to go on when ranks read different facts (settings, data fingerprints)."""
    mine = {name: json_text(value, sort_keys=True, default=str) for name, value in facts.items()}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    lines = []
    for name in sorted(set().union(*everyone)):
        by_value: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            by_value.setdefault(theirs.get(name, "absent"), []).append(rank)
        if len(by_value) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} on ranks {ranks}" for value, ranks in by_value.items()))
    if lines:
        raise DistributedError(
            f"ranks disagree about {what}",
            got="\n            ".join(lines),
            expected="the same on every rank",
            fix="start every rank with the same flags, files and versions",
        )


def broadcast_text(text: str, device: torch.device) -> str:
    """The first rank's text, however long, on every rank; between devices, so it costs the first rank one sending."""
    if dist.get_world_size() == 1:
        return text
    data = zlib.compress(text.encode(), 1) if dist.get_rank() == 0 else b""
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, 0)
    content = torch.empty(int(length), dtype=torch.uint8)
    if data:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    content = content.to(device)
    dist.broadcast(content, 0)
    return zlib.decompress(content.cpu().numpy().tobytes()).decode()


@contextlib.contextmanager
def on_axis(axis: str) -> Iterator[None]:
    """Remember for `explain_failure` which axis a collective inside is on."""
    try:
        yield
    except RuntimeError as error:
        vars(error).setdefault("axis", axis)
        raise


def explain_failure(error: BaseException, step: int) -> LostRank | None:
    """The named error for a collective that failed because a peer died or hangs; None for any other error."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    text = " ".join(str(part) for part in chain).lower()
    if not isinstance(error, RuntimeError) or not any(sign in text for sign in _SIGNS_OF_LOST_PEERS):
        return None
    axis = next((found for part in reversed(chain) if (found := _axis_of(part))), "unknown")
    return LostRank(
        f"a collective of rank {dist.get_rank()} failed at step {step}, on the {axis} axis",
        got=str(chain[-1]).splitlines()[0],
        expected="every rank of that axis to take part in time",
        fix="look for the first rank that ended or hangs; --distributed-timeout-minutes sets how long others wait",
    )


def _axis_of(error: BaseException) -> str | None:
    """The axis that an error was marked with, or whose collective stands nearest to the failure in its traceback."""
    marked: str | None = vars(error).get("axis")
    if marked is not None:
        return marked
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/fsdp/" in frame.filename:
            return "data"
        if frame.filename.endswith(("parallel/collectives.py", "parallel/tensor_parallel.py")):
            return "tensor"
        if "/pipelining/" in frame.filename:
            return "pipeline"
        if frame.filename.endswith("parallel/shared_parameters.py"):
            return "pipeline"
    return None
