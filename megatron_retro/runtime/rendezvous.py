"""Rendezvous: the store in which the ranks of one attempt find each other, under a prefix that no earlier one used.

torchrun's agent keeps one store over restarts, and gloo finds the addresses of dead ranks in it: restarted ranks would
wait for them until the timeout. Numbers that the agent hands out do not help, because agents of other hosts count their
own failures only. So the first rank of an attempt draws a prefix and tells it to whoever is there now.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from megatron_retro.runtime.launch import Launch

_POLL_SECONDS = 0.01


def store_of(launch: Launch, timeout: timedelta) -> Store:
    """The first rank's store; under torchrun that of its agent, which outlives restarts."""
    if launch.launcher == "torchrun":
        if launch.master_port == 0:
            raise ValueError("port 0: the agent's store took a free port and did not tell which")
        store, rank, world_size = next(rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
        return with_fresh_prefix(store, rank, world_size, timeout)
    address, port = launch.master_address, launch.master_port
    return TCPStore(address, port, launch.world_size, is_master=launch.rank == 0, timeout=timeout)


def with_fresh_prefix(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store under a prefix of this attempt's own; all of its ranks call it."""
    prefix = _announced(store, world_size, timeout) if rank == 0 else _requested(store, rank, timeout)
    return PrefixStore(prefix, store)


def _requested(store: Store, rank: int, timeout: timedelta) -> str:
    """Ask under a token of one's own, which only a first rank that is alive answers."""
    token = uuid.uuid4().hex
    store.set(f"rendezvous/request/{rank}", token)
    store.wait([f"rendezvous/reply/{token}"], timeout)
    prefix = bytes(store.get(f"rendezvous/reply/{token}")).decode()
    store.set(f"rendezvous/{prefix}/received/{rank}", "")
    return prefix


def _announced(store: Store, world_size: int, timeout: timedelta) -> str:
    """Reply to every rank, whoever asked before in its place included, until all say that they have the prefix."""
    prefix, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"rendezvous/request/{rank}"]):
                token = bytes(store.get(f"rendezvous/request/{rank}")).decode()
                store.set(f"rendezvous/reply/{token}", prefix)
        missing = [rank for rank in missing if not store.check([f"rendezvous/{prefix}/received/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"timed out waiting for ranks {missing}")
        time.sleep(_POLL_SECONDS)
    return prefix
