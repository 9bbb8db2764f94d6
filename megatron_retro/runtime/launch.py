"""Who this process is among all: a rank of one launch, or worker i of N that share work without talking.

A rank is told by torchrun, by srun, by MPI, or by nobody (then it is alone); a worker by `--shard i/N`, a SLURM array
or job, or MPI, all with the same numbering from 0. Only environment variables are read, so a plain
`srun python tools/pretrain.py ...` needs no launcher of its own. An explicit RANK and WORLD_SIZE (torchrun sets them)
win over MPI, and MPI wins over the SLURM step that carries its daemons. A batch script that is not inside a step is one
process, whatever SLURM has allocated for its steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_retro.errors import ConfigError, DistributedError

_FIRST_PORT = 20000
_PORTS = 20000
_LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class Launch:
    """This process's place, and where the ranks meet."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int

    @property
    def alone(self) -> bool:
        """One process, with nobody to meet."""
        return self.world_size == 1


def find_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """This process's place from a launcher's variables."""
    variables = os.environ if environment is None else environment
    for sign, build in (
        ("RANK", _from_torchrun),
        ("OMPI_COMM_WORLD_RANK", _from_open_mpi),
        ("SLURM_STEP_NUM_TASKS", _from_slurm),
        ("PMI_RANK", _from_hydra),
    ):
        if sign in variables and (sign != "RANK" or "WORLD_SIZE" in variables):
            return build(variables)
    return Launch("none", 0, 1, 0, 1, _LOCALHOST, 0)


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise DistributedError(
            f"the launcher's variable {name} is not a number", got=text, expected="a whole number"
        ) from None


def _from_torchrun(variables: Mapping[str, str]) -> Launch:
    world_size = _number(variables, "WORLD_SIZE")
    rank = _number(variables, "RANK")
    return Launch(
        "torchrun",
        rank,
        world_size,
        _number(variables, "LOCAL_RANK", rank),
        _number(variables, "LOCAL_WORLD_SIZE", world_size),
        variables.get("MASTER_ADDR", _LOCALHOST),
        _number(variables, "MASTER_PORT", _FIRST_PORT),
    )


def _from_slurm(variables: Mapping[str, str]) -> Launch:
    """A step of srun: the ranks meet on the first host of the step, on a port made from the job's number."""
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or _LOCALHOST
    world_size = _number(variables, "SLURM_STEP_NUM_TASKS")
    job = _number(variables, "SLURM_JOB_ID", 0) * 7 + _number(variables, "SLURM_STEP_ID", 0)
    on_this_node = _tasks_of_node(variables.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    return Launch(
        "srun",
        _number(variables, "SLURM_PROCID"),
        world_size,
        _number(variables, "SLURM_LOCALID"),
        on_this_node[_number(variables, "SLURM_NODEID", 0) % len(on_this_node)],
        variables.get("MASTER_ADDR") or first_host(nodes),
        _number(variables, "MASTER_PORT", _FIRST_PORT + job % _PORTS),
    )


def _from_open_mpi(variables: Mapping[str, str]) -> Launch:
    return _from_mpi(
        variables,
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    )


def _from_hydra(variables: Mapping[str, str]) -> Launch:
    return _from_mpi(variables, "MPICH", ("PMI_RANK", "PMI_SIZE"), ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"))


def _from_mpi(variables: Mapping[str, str], name: str, world: tuple[str, str], local: tuple[str, str]) -> Launch:
    """MPI tells no address: on one host none is needed, on several the user or SLURM gives one."""
    rank, world_size = _number(variables, world[0]), _number(variables, world[1])
    local_rank, local_size = _number(variables, local[0], rank), _number(variables, local[1], world_size)
    nodes = variables.get("SLURM_JOB_NODELIST")
    address = variables.get("MASTER_ADDR") or (first_host(nodes) if nodes else None)
    if address is None and local_size != world_size:
        raise DistributedError(
            f"{name} started ranks on several hosts, and none says where they meet",
            got=f"{world_size} ranks, {local_size} on this host, no MASTER_ADDR",
            expected="MASTER_ADDR set to the host of rank 0",
            fix="mpirun -x MASTER_ADDR=$(hostname) -x MASTER_PORT=29500 ...",
        )
    port = _number(variables, "MASTER_PORT", _FIRST_PORT + _job_number(variables) % _PORTS)
    return Launch(name, rank, world_size, local_rank, local_size, address or _LOCALHOST, port)


def _job_number(variables: Mapping[str, str]) -> int:
    """Something that the ranks of one MPI job share and two jobs on a host do not."""
    for name in ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE", "SLURM_JOB_ID", "PMI_PORT", "HYDI_CONTROL_FD"):
        digits = re.sub(r"\D", "", variables.get(name, ""))
        if digits:
            return int(digits)
    return 0


def first_host(nodes: str) -> str:
    """The first name of SLURM's compressed list: `n[03-04,7],gpu1` -> `n03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise DistributedError("this is no list of hosts", got=nodes, expected="SLURM's form, as n[01-04],m1")
    suffix = re.match(r"[^\]]*\]([^,\[]*)", nodes[match.start(2) :]) if match[2] else None
    return match[1] + (match[2] or "") + (suffix[1] if suffix else "")


def _tasks_of_node(text: str) -> list[int]:
    """`4(x2),3` -> [4, 4, 3]."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts or [1]


@dataclass(frozen=True)
class Worker:
    """This worker's number and how many there are."""

    index: int
    count: int

    def share(self, total: int) -> range:
        """This worker's contiguous share of `total` items."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)


def this_worker(shard: str | None, environment: Mapping[str, str] | None = None) -> Worker:
    """The worker that this process is; without any sign, the only one."""
    if shard is not None:
        return _from_text(shard)
    variables = os.environ if environment is None else environment
    if "SLURM_ARRAY_TASK_ID" in variables:
        first = int(variables.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(variables.get("SLURM_ARRAY_TASK_STEP", "1"))
        index = (int(variables["SLURM_ARRAY_TASK_ID"]) - first) // step
        return Worker(index, int(variables["SLURM_ARRAY_TASK_COUNT"]))
    for rank, size in (
        ("SLURM_PROCID", "SLURM_NTASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ):
        if rank in variables and size in variables:
            return Worker(int(variables[rank]), int(variables[size]))
    return Worker(0, 1)


def this_replica(
    shard: str | None, launch: Launch, tensor: int, pipeline: int, environment: Mapping[str, str] | None = None
) -> Worker:
    """The worker that this process's replica of a model is, where tensor x pipeline processes hold one replica.

    An array job or `--shard` divides the work first, and the replicas of each launch divide its part. Where every
    process holds a whole model, an explicit `--shard` is this process's own number.
    """
    variables = os.environ if environment is None else environment
    count = launch.world_size // (tensor * pipeline)
    if shard is not None and tensor * pipeline == 1:
        return this_worker(shard)
    whole = Worker(0, 1)
    if shard is not None or "SLURM_ARRAY_TASK_ID" in variables:
        whole = this_worker(shard, variables)
    return Worker(whole.index * count + launch.rank // tensor % count, whole.count * count)


def _from_text(shard: str) -> Worker:
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match:
        index, count = int(match[1]), int(match[2])
        if index < count:
            return Worker(index, count)
    raise ConfigError(f"--shard {shard}: no such worker", expected="i/N with 0 <= i < N, as 0/4 .. 3/4")
