"""What a rank holds and gathers under a pipeline schedule, counted: neither grows with the microbatches of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import _ComputationType, _PipelineScheduleRuntime
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.assembly.parallel_model import ParallelModel
from megatron_retro.config.data import DataConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.parallel.data_parallel import fsdp_units
from megatron_retro.parallel.mesh import PIPELINE, ParallelMesh, build_mesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.parallel.schedules import BoundedStage
from megatron_retro.planning.fake_device import fake_rank
from megatron_retro.testing.layout_grid import meshes
from megatron_retro.testing.layouts import random_batches, tiny_settings
from megatron_retro.testing.processes import run_ranks

FORMS = sorted(
    {
        tuple(sorted({**mesh, "tensor_model_parallel_size": 1, "sequence_parallel": False}.items()))
        for _, mesh in meshes()
        if mesh["pipeline_model_parallel_size"] > 1 and mesh["data_parallel_sharding"] != "none"
    }
)
FOUR_STAGES_A_RANK = {
    "num_layers": 8,
    "retro_layers": (2, 4),
    "pipeline_model_parallel_size": 2,
    "pipeline_schedule": "interleaved",
    "num_layers_per_virtual_pipeline_stage": 1,
}


def model_on(settings: Settings, mesh: ParallelMesh) -> ParallelModel:
    return ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length))


def num_gathers(schedule: Any, rank: int) -> dict[int, int]:
    """How often one step of a schedule gathers the parameters of each of this rank's stages."""
    if not isinstance(schedule, _PipelineScheduleRuntime):
        return {schedule._stage.stage_index: 1}  # FSDP's own hooks do, at the first use
    order = schedule.pipeline_order_with_comms[rank]
    return dict(Counter(one.stage_index for one in order if one.computation_type == _ComputationType.UNSHARD))


def gathers(settings: Settings, rank: int, *, training: bool) -> dict[int, int]:
    """How often a step gathers each stage of a pipeline rank, on a cluster of two replicas that is not there."""
    batches = random_batches(settings)
    world = 2 * settings[ParallelConfig].pipeline_model_parallel_size
    with fake_rank(2 * rank, world, settings[ParallelConfig]) as mesh:
        model = model_on(settings, mesh)
        schedule = model._runs._schedule(batches, training=training)
        return num_gathers(schedule, mesh.rank(PIPELINE))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(str(value) for _, value in form))
def test_parameters_are_gathered_once_a_step(form: tuple[tuple[str, Any], ...]) -> None:
    settings = tiny_settings(**dict(form))
    sharding = settings[ParallelConfig].sharding()
    for training in (True, False):
        counted = gathers(settings, 1, training=training)
        assert counted
        if sharding != "full":
            assert set(counted.values()) == {1}


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble"])
def test_four_stages_a_rank_are_gathered_once_too(schedule: str) -> None:
    """torch's order keeps three stages whole, and gathers four of them again and again."""
    changes = {**FOUR_STAGES_A_RANK, "pipeline_schedule": schedule, "global_batch_size": 16}
    counted = gathers(tiny_settings(**changes, data_parallel_sharding="optimizer"), 0, training=True)
    assert counted == dict.fromkeys((0, 2, 4, 6), 1)
    again = gathers(tiny_settings(**changes, data_parallel_sharding="full"), 0, training=True)
    assert max(again.values()) > 1


class CountedGathers(TorchDispatchMode):
    """Counts the all-gathers of one tensor that reach the process group."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def all_gathers(settings: Settings) -> tuple[int, int]:
    """Of a training step, by count: what FSDP2 gathered, and how many units there are here."""
    model = model_on(settings, build_mesh(settings[ParallelConfig], torch.device("cpu")))
    batches = random_batches(settings)
    with CountedGathers() as counted:
        model.train_step(batches[: len(batches) // model.data_size])
    return counted.found, sum(1 + len(list(fsdp_units(stage.model))) for stage in model.stages)


def test_what_is_counted_is_what_is_sent() -> None:
    settings = tiny_settings(**FOUR_STAGES_A_RANK, data_parallel_sharding="optimizer", global_batch_size=8)
    for found, num_units in run_ranks(all_gathers, 4, settings, timeout=120.0):
        assert 0 < found <= num_units


@contextmanager
def counted_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many tensors to receive into live at once, now and at most."""
    count: Counter[str] = Counter()
    allocate, release = BoundedStage._allocate, BoundedStage._release

    def counting_allocate(stage: BoundedStage, infos: Any) -> None:
        infos = [info for info in infos if info.buffer is not None]
        count["now"] += len(infos)
        count["most"] = max(count["most"], count["now"])
        allocate(stage, infos)

    def counting_release(stage: BoundedStage, infos: Any) -> None:
        infos = list(infos)
        count["now"] -= sum(info.buffer is not None and info.buffer.device.type != "meta" for info in infos)
        release(stage, infos)

    monkeypatch.setattr(BoundedStage, "_allocate", counting_allocate)
    monkeypatch.setattr(BoundedStage, "_release", counting_release)
    yield count


@contextmanager
def counted_sends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many sends keep their tensors at once, now and at most: those that nobody has waited for."""
    count: Counter[str] = Counter()
    start, wait = torch_schedules._batch_p2p, torch_schedules._wait_batch_p2p
    sends: set[int] = set()

    def starting(ops: Any, desc: Any = None) -> Any:
        works = start(ops, desc)
        if ops and all(one.op is dist.isend for one in ops):
            sends.update(map(id, works))
            kept.extend(works)  # or another work gets its number
            count["most"] = max(count["most"], len(sends))
        return works

    def waiting(works: Any) -> None:
        sends.difference_update(map(id, works))
        wait(works)

    kept: list[Any] = []
    monkeypatch.setattr(torch_schedules, "_batch_p2p", starting)
    monkeypatch.setattr(torch_schedules, "_wait_batch_p2p", waiting)
    yield count


def live_sends(settings: Settings) -> tuple[int, int]:
    """Of a training step, and of an evaluation."""
    model = model_on(settings, build_mesh(settings[ParallelConfig], torch.device("cpu")))
    found = []
    for act in (model.train_step, model.evaluate):
        with pytest.MonkeyPatch.context() as patch, counted_sends(patch) as count:
            act(random_batches(settings))
        found.append(count["most"])
    return found[0], found[1]


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble"])
def test_what_is_sent_does_not_stay(schedule: str) -> None:
    """Until the end of a step; torch waits for no send before. Four stages with two sends each, of two tensors."""
    settings = tiny_settings(**FOUR_STAGES_A_RANK | {"pipeline_schedule": schedule}, global_batch_size=16)
    for training, evaluating in run_ranks(live_sends, 2, settings, timeout=120.0):
        assert 0 < evaluating <= training <= 4 * 3 * 2


def live_buffers(settings: Settings, evaluating: bool) -> tuple[int, int]:
    model = model_on(settings, build_mesh(settings[ParallelConfig], torch.device("cpu")))
    with pytest.MonkeyPatch.context() as patch, counted_buffers(patch) as count:
        if evaluating:
            model.evaluate(random_batches(settings))
        else:
            model.train_step(random_batches(settings))
    buffers = [
        info.buffer
        for schedule in model._runs._schedules.values()
        for stage in getattr(schedule, "_stages", None) or [schedule._stage]
        for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values())
        for info in infos
        if info.buffer is not None
    ]
    kept = sum(buffer.device.type != "meta" for buffer in buffers)
    return count["most"], kept


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "1f1b"},
        {"pipeline_model_parallel_size": 4, "pipeline_schedule": "zero-bubble"},
        {**FOUR_STAGES_A_RANK, "num_layers": 4, "num_layers_per_virtual_pipeline_stage": 1},
    ],
    ids=["1f1b", "zero-bubble", "interleaved"],
)
def test_buffers_do_not_grow_with_the_microbatches(schedule: dict[str, Any], evaluating: bool) -> None:
    world = schedule["pipeline_model_parallel_size"]
    most = {}
    for microbatches in (16, 32):
        settings = tiny_settings(**schedule, global_batch_size=microbatches)
        ranks = run_ranks(live_buffers, world, settings, evaluating, timeout=120.0)
        assert all(kept == 0 for _, kept in ranks)
        most[microbatches] = [peak for peak, _ in ranks]
    assert most[16] == most[32]
    assert max(most[16]) > 0
