"""The same place in the world from every launcher's variables, and named errors where ranks cannot meet."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from megatron_retro.errors import ConfigError, DistributedError, MegatronRetroError
from megatron_retro.runtime import process_group as group_module
from megatron_retro.runtime.launch import Launch, find_launch, first_host
from megatron_retro.runtime.process_group import agree, choose_device, explain_failure, process_group
from megatron_retro.runtime.reach import slow_pairs
from megatron_retro.runtime.rendezvous import with_fresh_prefix
from megatron_retro.testing.processes import run_ranks

SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
}


def test_no_launcher_is_one_process() -> None:
    launch = find_launch({})
    assert launch.alone and launch.launcher == "none"


def test_torchrun() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    launch = find_launch({**variables, "MASTER_ADDR": "a", "MASTER_PORT": "9"})
    assert launch == Launch("torchrun", 3, 4, 1, 2, "a", 9)


def test_srun_from_slurms_variables_alone() -> None:
    launch = find_launch(SLURM)
    assert (launch.launcher, launch.rank, launch.world_size) == ("srun", 5, 8)
    assert (launch.local_rank, launch.local_world_size, launch.master_address) == (1, 4, "gpu03")
    others = [find_launch({**SLURM, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank // 4)}) for rank in range(8)]
    assert {(other.master_address, other.master_port) for other in others} == {("gpu03", launch.master_port)}
    assert find_launch({**SLURM, "SLURM_JOB_ID": "72"}).master_port != launch.master_port


def test_a_batch_script_outside_a_step_is_one_process() -> None:
    assert find_launch({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).alone


def test_torchrun_inside_a_slurm_step_wins() -> None:
    assert find_launch({**SLURM, "RANK": "0", "WORLD_SIZE": "2"}).launcher == "torchrun"


def test_mpi() -> None:
    variables = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    local = {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    launch = find_launch({**variables, **local})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.master_address) == (1, 2, 1, "127.0.0.1")
    assert find_launch({"PMI_RANK": "1", "PMI_SIZE": "3"}).world_size == 3


def test_mpi_over_hosts_needs_an_address() -> None:
    variables = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(DistributedError, match="MASTER_ADDR"):
        find_launch(variables)
    assert find_launch({**variables, "MASTER_ADDR": "host"}).master_address == "host"


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(DistributedError, match="WORLD_SIZE"):
        find_launch({"RANK": "0", "WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[03-04,7],gpu1", "n03"), ("n[7,9]", "n7"), ("a1,b2", "a1"), ("rack[2-3]-ib,x", "rack2-ib")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_lone_process_gets_a_group_of_one() -> None:
    def alone() -> float:
        with process_group(find_launch({}), timeout_minutes=1, use_gpu=False) as device:
            value = torch.ones(1, device=device)
            dist.all_reduce(value)
            return float(value)

    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    assert run_ranks(alone, 1, initialize=False) == [1.0]


@pytest.mark.parametrize("launcher", ["torchrun", "srun", "Open MPI"])
def test_every_launcher_leads_to_the_same_group(launcher: str) -> None:
    def meet() -> tuple[str, float]:
        rank, port = os.environ.pop("RANK"), os.environ["MASTER_PORT"]
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        size = os.environ.pop("WORLD_SIZE")
        names = {
            "torchrun": {"RANK": rank, "WORLD_SIZE": size},
            "srun": {"SLURM_STEP_NUM_TASKS": size, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            "Open MPI": {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": size},
        }[launcher]
        os.environ.update(names, MASTER_PORT=port)
        launch = find_launch()
        with process_group(launch, timeout_minutes=0.5, use_gpu=False):
            value = torch.tensor([float(launch.rank)])
            dist.all_reduce(value)
            dist.barrier()
            return launch.launcher, float(value)

    assert run_ranks(meet, 3, initialize=False) == [(launcher, 3.0)] * 3


class SlowStore(Store):
    """A store on a slow network."""

    def __init__(self, inner: Store) -> None:
        super().__init__()
        self.inner = inner

    def set(self, key: str, value: str) -> None:
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        time.sleep(0.3)
        return self.inner.get(key)

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self.inner.wait(keys, *timeout)


def test_a_first_rank_that_leaves_at_once_takes_the_store_from_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    store = group_module.store_of

    def leave() -> int:
        if find_launch().rank:
            monkeypatch.setattr(group_module, "store_of", lambda *place: SlowStore(store(*place)))
        with process_group(find_launch(), timeout_minutes=0.5, use_gpu=False):
            return dist.get_rank()

    assert run_ranks(leave, 3, initialize=False) == [0, 1, 2]


def test_ranks_that_never_come_are_an_error_with_the_address() -> None:
    def wait() -> str:
        launch = Launch("srun", 1, 2, 1, 2, "127.0.0.1", 1)
        with pytest.raises(DistributedError) as caught, process_group(launch, timeout_minutes=0.02, use_gpu=False):
            pass
        return str(caught.value)

    assert "127.0.0.1:1" in run_ranks(wait, 1, initialize=False)[0]


def test_ranks_that_disagree_are_told_where() -> None:
    def compare() -> str:
        facts = {"seed": 1, "lr": 0.1 if dist.get_rank() != 2 else 0.2}
        agree({"seed": 1}, "settings")
        with pytest.raises(DistributedError) as caught:
            agree(facts, "settings")
        return str(caught.value)

    for message in run_ranks(compare, 3):
        assert re.search(r"lr: 0\.1 on ranks \[0, 1\]; 0\.2 on ranks \[2\]", message)
        assert "seed" not in message.split("got:")[1].split("expected")[0]


def test_other_errors_are_left_alone() -> None:
    assert explain_failure(ValueError("timed out"), 3) is None
    assert explain_failure(RuntimeError("shapes differ"), 3) is None


def test_cpu_is_chosen_where_there_is_no_gpu() -> None:
    assert choose_device(find_launch({}), use_gpu=False).type == "cpu"


def test_each_attempt_has_a_store_prefix_of_its_own() -> None:
    """On one store, as torchrun's agent keeps it; a rank of the first attempt died while it was asking."""
    store, limit = HashStore(), timedelta(seconds=20)
    store.set("rendezvous/request/2", "asked by a rank that is dead")

    def attempt(number: int) -> set[str]:
        def meet(rank: int) -> str:
            time.sleep(0.05 * ((rank + number) % 3))
            prefixed = with_fresh_prefix(store, rank, 3, limit)
            prefixed.set(f"from {rank}", str(number))
            return ",".join(bytes(prefixed.get(f"from {other}")).decode() for other in range(3))

        with ThreadPoolExecutor(3) as pool:
            return set(pool.map(meet, range(3)))

    assert [attempt(number) for number in (1, 2, 3)] == [{"1,1,1"}, {"2,2,2"}, {"3,3,3"}]


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"timed out waiting for ranks \[1\]"):
        with_fresh_prefix(HashStore(), 0, 2, timedelta(seconds=0.1))


def test_port_0_of_torchrun_is_refused_at_once() -> None:
    launch = Launch("torchrun", 0, 2, 0, 2, "a", 0)
    with pytest.raises(DistributedError, match="port 0") as refused, process_group(launch):
        pass
    assert "--standalone" in str(refused.value)


@pytest.mark.parametrize("refusing", [0, 2])
def test_peers_of_a_rank_that_refuses_say_what_it_said(refusing: int, tmp_path: Path) -> None:
    """Whether or not it keeps the store; and nobody waits for a timeout."""

    def refuse() -> None:
        launch = find_launch()
        try:
            with process_group(launch, use_gpu=False):
                if launch.rank == refusing:
                    raise ConfigError("no such thing", fix="mend it")
                dist.barrier()
        except MegatronRetroError as error:
            (tmp_path / str(launch.rank)).write_text(f"{error.exit_code} {error}")

    run_ranks(refuse, 3, initialize=False, timeout=30)
    said = "no such thing\n  fix:      mend it"
    words = [f"2 {said}" if rank == refusing else f"2 rank {refusing}: {said}" for rank in range(3)]
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == words


def test_a_slow_link_is_named_and_an_even_network_is_not() -> None:
    assert slow_pairs([10.0, 9.0, 4.0, 11.0], ["a", "b", "c", "d", "e"]) == [
        "slow link: ranks 2 and 3 (c, d) exchange 4 GB/s, the median is 9.5"
    ]
    assert slow_pairs([10.0, 9.0, 6.0], list("abcd")) == [] and slow_pairs([1.0], ["a", "b"]) == []
