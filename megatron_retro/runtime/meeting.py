"""Where the ranks of one attempt meet: a corner of the launcher's store that no earlier attempt has written to.

torchrun's agent keeps one store over restarts, and gloo finds the addresses of dead ranks in it: restarted ranks would
wait for them until the timeout. Numbers that the agent hands out do not help, because agents of other hosts count their
own failures only. So the first rank of an attempt draws a name and tells it to whoever is there now.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

_POLL_SECONDS = 0.01


def fresh_corner(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store under a name of this attempt; all of its ranks call it."""
    name = _named_for_all(store, world_size, timeout) if rank == 0 else _asked_for(store, rank, timeout)
    return PrefixStore(name, store)


def _asked_for(store: Store, rank: int, timeout: timedelta) -> str:
    """Ask under a name of one's own, which only a first rank that is alive answers."""
    token = uuid.uuid4().hex
    store.set(f"meeting/asks/{rank}", token)
    store.wait([f"meeting/answers/{token}"], timeout)
    name = bytes(store.get(f"meeting/answers/{token}")).decode()
    store.set(f"meeting/{name}/has/{rank}", "")
    return name


def _named_for_all(store: Store, world_size: int, timeout: timedelta) -> str:
    """Answer every rank, whoever asked before in its place included, until all say that they have the name."""
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"meeting/asks/{rank}"]):
                token = bytes(store.get(f"meeting/asks/{rank}")).decode()
                store.set(f"meeting/answers/{token}", name)
        missing = [rank for rank in missing if not store.check([f"meeting/{name}/has/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"timed out waiting for ranks {missing}")
        time.sleep(_POLL_SECONDS)
    return name
