"""Sockets per rank grow with the logarithm of the ranks; what the store carries arrives whole, and so do failures."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_retro.errors import DamagedArtifact
from megatron_retro.runtime.heartbeat import start_heartbeat
from megatron_retro.runtime.launch import find_launch
from megatron_retro.runtime.process_group import agree, broadcast_text, most_sockets, process_group
from megatron_retro.runtime.store_channel import open_channel
from megatron_retro.testing.processes import run_ranks

_ESTABLISHED = "01"


def sockets(own_port: str) -> int:
    """Established connections of this process, but those that others have to the store that it keeps."""
    held = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            held.add(os.readlink(entry))
        except OSError:
            continue
    found = 0
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            is_store = words[1].rsplit(":", 1)[1] == own_port
            found += words[3] == _ESTABLISHED and not is_store and f"socket:[{words[9]}]" in held
    return found


def talked() -> int:
    """Sockets of this rank after everything that a run does on its world: groups, sums, texts, barriers, saves."""
    launch = find_launch()
    with process_group(launch):
        heartbeat, channel = start_heartbeat(), open_channel("checkpoints")
        assert heartbeat is not None
        mesh = dist.init_device_mesh("cpu", (1, launch.world_size, 1), mesh_dim_names=("pipeline", "data", "tensor"))
        groups = [dist.new_group(backend="gloo") for _ in range(3)]
        dist.all_reduce(torch.zeros(1000))
        agree({"seed": 1}, "settings")
        broadcast_text("the index of a checkpoint", torch.device("cpu"))
        dist.barrier()
        channel.gather(lambda: "a share")
        channel.barrier()
        found = sockets(f"{launch.master_port:04X}" if launch.rank == 0 else "")
        assert len(groups) == 3 and mesh.ndim == 3
        dist.barrier()
        heartbeat.close()
        return found


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sockets_per_rank_do_not_grow_with_the_ranks(ranks: int) -> None:
    found = run_ranks(talked, ranks, initialize=False, timeout=120)
    assert max(found) <= most_sockets(ranks), found
    assert max(found) >= 3, "something was counted"


def test_a_channel_carries_texts_of_any_size_and_the_failure_of_one_rank_to_all() -> None:
    def talk() -> list[object]:
        channel = open_channel("test")
        large = "é" * 1_000 + os.urandom(3_000_000).hex()
        heard: list[object] = [channel.first(lambda: large)[:3], len(channel.first(lambda: large))]
        heard += [channel.gather(lambda: f"from {channel.rank}"), channel.scatter(lambda: ["a", "b", "c"])]

        def refuse(rank: int, kind: type[Exception]) -> str:
            if channel.rank == rank:
                raise kind("the shard is cut")
            return ""

        for act in (channel.gather, channel.first):
            for kind in (DamagedArtifact, ValueError):
                who = 2 if act == channel.gather else 0
                try:
                    act(lambda who=who, kind=kind: refuse(who, kind))  # type: ignore[misc]
                except Exception as error:
                    heard.append((type(error).__name__, "the shard is cut" in str(error)))
        channel.barrier()
        return heard

    first, second, third = run_ranks(talk, 3)
    assert first[:4] == ["ééé", 6_001_000, ["from 0", "from 1", "from 2"], "a"]
    assert second[2:4] == [[], "b"] and third[2:4] == [[], "c"]
    for heard, own in ((first, 2), (third, 0)):
        kinds = [kind for kind, whole in heard[4:] if whole]  # type: ignore[misc]
        assert kinds[0] == kinds[2] == "DamagedArtifact" and len(kinds) == 4
        assert {kinds[1], kinds[3]} <= {"ValueError", "RuntimeError"}, own


def test_the_rank_that_keeps_the_store_leaves_a_barrier_last() -> None:
    """Its process, and with it the store, is gone before a slow rank would have looked."""

    def slow() -> bool:
        launch = find_launch()
        with process_group(launch):
            channel = open_channel("checkpoints")
            wait = channel._await
            if launch.rank:
                channel._await = lambda *arguments: (time.sleep(0.4), wait(*arguments))[1]  # type: ignore[method-assign]
            channel.barrier()
        return True

    assert run_ranks(slow, 2, initialize=False, timeout=120) == [True, True]
