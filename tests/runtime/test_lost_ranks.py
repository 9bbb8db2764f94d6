"""Who is to blame is known after the process that knew it is gone, and records of collectives run nothing."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import signal
import socket
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import TCPStore

from megatron_retro.cli.main import main
from megatron_retro.errors import EXIT_LOST_RANK, ArtifactError, LostRank
from megatron_retro.runtime import heartbeat as heartbeat_module
from megatron_retro.runtime import process_group as group_module
from megatron_retro.runtime import refusals as refusals_module
from megatron_retro.runtime.flight_recorder import FILE_START, behind, read_flight, read_flights
from megatron_retro.runtime.foreign_pickles import read_pickle
from megatron_retro.runtime.heartbeat import Beat, blame, start_heartbeat
from megatron_retro.runtime.launch import Launch, find_launch
from megatron_retro.runtime.process_group import process_group
from megatron_retro.runtime.run_log import CULPRITS, FLIGHT
from megatron_retro.runtime.store_channel import open_channel
from megatron_retro.testing.processes import RankFailure, fork, run_ranks, wait

pytestmark = pytest.mark.long


def beat(rank: int, count: int, step: int, phase: str = "forward_backward") -> Beat:
    return Beat(rank, count, step, phase, f"node{rank // 2}", 100 + rank)


def test_the_silent_the_late_and_the_odd_one_out_are_blamed() -> None:
    before = [beat(rank, 5, 7) for rank in range(4)]
    well = [beat(rank, 8, 7) for rank in range(4)]
    assert blame(before, well).culprits == () and "4 in forward_backward" in blame(before, well).words
    silent = blame(before, [*well[:3], beat(3, 5, 7)])
    assert [(culprit.rank, culprit.node) for culprit in silent.culprits] == [(3, "node1")]
    late = blame(before, [well[0], beat(1, 8, 6, "data"), *well[2:]])
    assert "rank 1 (process 101 on node0) is stuck at step 6, data; others are at 7" in late.words
    odd = blame(before, [*well[:2], beat(2, 8, 7, "data"), well[3]])
    assert [culprit.rank for culprit in odd.culprits] == [2] and "3 others are at forward_backward" in odd.words
    half = blame(before, [*well[:2], beat(2, 8, 7, "data"), beat(3, 8, 7, "data")])
    assert half.culprits == (), "two against two is no verdict"


def watched(run: Path) -> None:
    """A rank of a step in which rank 1 never comes to the sum; a thread of C ends it, as NCCL's watchdog does."""
    launch = find_launch()

    def watchdog() -> None:
        deadline = time.monotonic() + 60
        while not (run / CULPRITS).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        (run / FLIGHT / f"{FILE_START}{launch.rank}").write_bytes(_distributed_c10d._dump_fr_trace())
        time.sleep(1.0)  # until all have their record
        ctypes.CDLL(None).abort()

    with process_group(launch):
        threading.Thread(target=watchdog, daemon=True).start()
        heartbeat = start_heartbeat(0.2, run, timedelta(seconds=6))
        assert heartbeat is not None
        data = dist.new_group(backend="gloo", group_desc="data")
        for step in range(3):
            heartbeat.note(step + 1, "data")
            if step == 2 and launch.rank == 1:
                time.sleep(100)
            heartbeat.note(step + 1, "forward_backward")
            try:
                dist.all_reduce(torch.zeros(4, 2), group=data)
            except RuntimeError:  # gloo tells Python that a peer is gone; a host that waits for a GPU hears nothing
                time.sleep(100)


def test_a_watchdog_that_aborts_the_process_leaves_the_culprit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three gloo ranks, each ended with SIGABRT from outside of Python: no handler runs, no error is raised."""
    (tmp_path / FLIGHT).mkdir()
    port = free_port()

    def one(rank: int) -> None:
        place = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update({"TORCH_FR_BUFFER_SIZE": "100", "SLURMD_NODENAME": f"node-{rank}"})
        watched(tmp_path)

    ranks = [fork(partial(one, rank)) for rank in range(3)]
    assert [wait(rank, 120) for rank in ranks] == [-signal.SIGABRT] * 3
    facts = json.loads((tmp_path / CULPRITS).read_text())
    assert [(culprit["rank"], culprit["node"]) for culprit in facts["culprits"]] == [(1, "node-1")]
    assert sum('"node": "node-1"' in line for line in (tmp_path / CULPRITS).read_text().splitlines()) == 1
    assert facts["step"] == 3 and "rank 1" in facts["words"] and "data" in facts["words"]
    assert main(["inspect", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "ranks 0, 2 wait in gloo:all_reduce 4x2, number 3" in told
    assert "rank 1 came only to gloo:all_reduce, number 2 (done)" in told


@pytest.mark.parametrize("where", ["a collective", pytest.param("a message", marks=pytest.mark.full)])
def test_a_stopped_keeper_of_the_store_holds_nobody(tmp_path: Path, where: str) -> None:
    """It accepts questions and never answers; every wait for an answer ends, and the others leave with 76."""

    def one(rank: int) -> None:
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(heartbeat_module, "_LONGEST_CALL", 1.0)
        monkeypatch.setattr(refusals_module, "_LONGEST_CALL", 1.0)
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        with process_group(find_launch(), timeout_minutes=0.05):
            heartbeat = start_heartbeat(0.2, tmp_path, timedelta(seconds=3))
            assert heartbeat is not None
            channel = open_channel("test", timeout=timedelta(seconds=1))
            channel.barrier()
            if rank == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            try:
                channel.first(str) if where == "a message" else dist.all_reduce(torch.zeros(1))
            except RuntimeError as error:
                raise LostRank(heartbeat.blame().words) from error

    port = free_port()
    ranks = [fork(partial(one, rank)) for rank in range(2)]
    try:
        assert wait(ranks[1], 40) == EXIT_LOST_RANK
    finally:
        os.kill(ranks[0], signal.SIGKILL)
    assert wait(ranks[0], 10) == -signal.SIGKILL


@pytest.mark.parametrize(
    "when", ["before they met", "while they meet", pytest.param("in the agent", marks=pytest.mark.full)]
)
def test_a_stopped_keeper_of_the_store_lets_nobody_wait_at_the_start(when: str) -> None:
    """The store's process is stopped before a rank reaches it, or between store and group; the others leave with 76."""

    def place(rank: int) -> None:
        names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        if when == "in the agent":
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        elif when == "while they meet" and rank == 0:
            store_of = group_module.store_of
            stop = partial(os.kill, os.getpid(), signal.SIGSTOP)
            pytest.MonkeyPatch().setattr(group_module, "store_of", lambda *words: (store_of(*words), stop())[0])

    def keeper() -> None:
        place(0)
        if when == "in the agent":
            store = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
            time.sleep(100)
            del store
        with process_group(find_launch(), timeout_minutes=1):
            pass

    def peer() -> None:
        place(1)
        with process_group(
            Launch("torchrun" if when == "in the agent" else "srun", 1, 2, 1, 2, "127.0.0.1", port),
            timeout_minutes=0.02,
        ):
            pass

    port = free_port()
    first = fork(keeper)
    try:
        if when != "while they meet":
            until_listening(port)
            os.kill(first, signal.SIGSTOP)
        other = fork(peer)
        left = wait(other, 20)
        if left is None:
            os.kill(other, signal.SIGKILL)
        assert left == EXIT_LOST_RANK
    finally:
        os.kill(first, signal.SIGKILL)
    assert wait(first, 10) == -signal.SIGKILL


def until_listening(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise AssertionError(f"nobody listens at port {port}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def recorded() -> bytes:
    dist.all_reduce(torch.zeros(3))
    return bytes(_distributed_c10d._dump_fr_trace())


def test_what_torch_writes_is_read_without_running_any_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    data = run_ranks(recorded, 2)[0]
    assert read_pickle(data) == pickle.loads(data)
    (tmp_path / f"{FILE_START}0").write_bytes(data)
    (flight,) = read_flights(tmp_path)
    assert flight.collectives[-1].name == "gloo:all_reduce" and flight.collectives[-1].sizes == "3"
    assert "all 1 ranks came to gloo:all_reduce 3" in behind([flight])[0]
    plain = {"a": [1, -5, 2**70, 1.5, None, True], "b": ("x", (), (1, 2, 3, 4)), "é": "x" * 300}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert read_pickle(pickle.dumps(plain, protocol)) == plain

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/code-ran",)

    for broken in (
        pickle.dumps({"entries": [Bomb()]}),
        data[:-40],
        b"",
        b"junk",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02s.",
        b"\x80\x02]r\xff\xff\xff\x7f.",  # would fill 34 GB
    ):
        (tmp_path / f"{FILE_START}1").write_bytes(broken)
        with pytest.raises(ArtifactError, match="rank-1 is no flight record"):
            read_flight(tmp_path / f"{FILE_START}1", 1)
    assert not (tmp_path / "code-ran").exists()


def test_errors_are_shown_before_groups_are_destroyed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where destroying the groups ends the process, as NCCL may."""

    def lost() -> None:
        from megatron_retro.runtime import process_group as module

        module.end_process_group = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        with process_group(find_launch()):
            raise LostRank("rank 7 is gone")

    with pytest.raises(RankFailure):
        run_ranks(lost, 2, initialize=False)
    assert capfd.readouterr().err.count("error: rank 7 is gone") >= 1
