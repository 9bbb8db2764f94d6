"""Ranks that hang, die or drift apart end in an error that names them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.assembly.parallel_model import ParallelModel
from megatron_retro.config.data import DataConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import DistributedError
from megatron_retro.parallel.mesh import AXES, build_mesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.parallel.shared_parameters import require_equal
from megatron_retro.planning.fake_device import fake_rank
from megatron_retro.runtime.launch import find_launch
from megatron_retro.runtime.process_group import process_group
from megatron_retro.testing.layouts import random_batches, tiny_settings
from megatron_retro.testing.processes import run_ranks

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "data": {"data_parallel_sharding": "full"},
    "pipeline": {"pipeline_model_parallel_size": 2},
}


def _build(settings: Settings) -> ParallelModel:
    mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
    return ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length))


@pytest.mark.parametrize("axis", LAYOUTS)
def test_a_rank_that_stays_away_is_told_with_rank_axis_and_step(axis: str) -> None:
    """Rank 1 ends after a good step; rank 0 says where it missed it, counting steps from 1 as the log does."""
    settings = tiny_settings(**LAYOUTS[axis], global_batch_size=2)
    batches = random_batches(settings)

    def lose_one() -> str:
        with process_group(find_launch(), timeout_minutes=1.0, use_gpu=False):
            model = _build(settings)
            own = batches if axis != "data" else batches[:1]
            model.train_step(own, step=41)
            if model.mesh.devices.get_rank() == 1:
                return "left"
            with pytest.raises(DistributedError) as caught:
                model.train_step(own, step=42)
            return str(caught.value)

    told, left = run_ranks(lose_one, 2, initialize=False)
    assert left == "left"
    assert f"a collective of rank 0 failed at step 43, on the {axis} axis" in told


def test_a_rank_that_hangs_ends_the_others_when_the_timeout_passes(tmp_path: Path) -> None:
    settings = tiny_settings(**LAYOUTS["tensor"], global_batch_size=2, distributed_timeout_minutes=0.1)
    batches = random_batches(settings)

    def hang() -> str:
        with process_group(find_launch(), timeout_minutes=0.1, use_gpu=False):
            model = _build(settings)
            if model.mesh.devices.get_rank() == 1:
                while not (tmp_path / "told").exists():  # it hangs for as long as the other waits
                    time.sleep(0.02)
                return "hung"
            with pytest.raises(DistributedError) as caught:
                model.train_step(batches, step=3)
            (tmp_path / "told").touch()
            return str(caught.value)

    told, hung = run_ranks(hang, 2, initialize=False)
    assert hung == "hung"
    assert "at step 4, on the tensor axis" in told


@pytest.mark.parametrize("axis", ["tensor", "data"])
def test_replicas_that_drift_apart_are_found(axis: str) -> None:
    settings = tiny_settings(**{**LAYOUTS[axis], "data_parallel_sharding": "none"}, global_batch_size=2)

    def drift() -> str:
        model = _build(settings)
        model.check_replicas()
        if dist.get_rank() == 1:
            weight = dict(model.module.named_parameters())["layers.2.input_norm.weight"].detach()
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            local.view(torch.int32)[3] ^= 1  # the last bit of one number
        with pytest.raises(DistributedError) as caught:
            model.check_replicas()
        return str(caught.value)

    for message in run_ranks(drift, 2):
        assert "1 replicated parameters differ" in message
        assert "layers.2.input_norm.weight" in message
        assert axis in message


def test_comparing_replicas_takes_little_memory() -> None:
    """Whatever a parameter's size: no tensor of it is made that is larger than a block's."""
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operator(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not operator.is_view:
                made.append(result.numel() * result.element_size())
            return result

    def compare() -> list[int]:
        large = torch.arange(5_000_001, dtype=torch.float32)
        with Watch():
            require_equal([("large", large)], dist.group.WORLD, "data")
        if dist.get_rank() == 1:
            large.view(torch.int32)[-1] ^= 1
        with pytest.raises(DistributedError, match="large"):
            require_equal([("large", large)], dist.group.WORLD, "data")
        return made

    for sizes in run_ranks(compare, 2):
        assert 0 < max(sizes) <= 8 << 22


@pytest.mark.parametrize("axes", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_every_axis_meets_before_the_first_step_in_one_order(
    monkeypatch: pytest.MonkeyPatch, axes: dict[str, int]
) -> None:
    """A group that connects only when a stage comes to it waits for stages that wait for others."""
    reduce, met = dist.all_reduce, list[int]()

    def count(tensor: torch.Tensor, *args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
        met.append(dist.get_world_size(group))
        return reduce(tensor, *args, group=group, **kwargs)

    def meet() -> list[list[int]]:
        mesh = build_mesh(tiny_settings(**axes, global_batch_size=4)[ParallelConfig], torch.device("cpu"))
        return [met, [mesh.size(axis) for axis in AXES if mesh.size(axis) > 1]]

    monkeypatch.setattr(dist, "all_reduce", count)
    for groups, expected in run_ranks(meet, 4):
        assert groups == expected and len(groups) == 2


def test_ranks_that_come_after_a_plan_of_their_layout_have_groups_of_their_own() -> None:
    """Torch remembers layouts by the numbers of their ranks; what it kept of a plan's would be taken for theirs."""
    settings = tiny_settings(tensor_model_parallel_size=2, data_parallel_sharding="optimizer", global_batch_size=4)
    parts = stage_parts(settings, settings[DataConfig].seq_length)
    for rank in range(4):
        with fake_rank(rank, 4, settings[ParallelConfig]) as mesh:
            ParallelModel(settings, mesh, parts)

    assert run_ranks(lambda: _build(settings).mesh.devices.size(), 4) == [4] * 4


class NoReading(TorchDispatchMode):
    """For any value that the host reads, it would wait for a GPU; whole numbers here are of meshes, on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        assert not reads, "the host reads a number within a step"
        return func(*args, **(kwargs or {}))


def unread_step(settings: Settings) -> float:
    mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
    model = ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length))
    batches = random_batches(settings)
    own = batches[: len(batches) // model.data_size]
    with NoReading():
        result = model.train_step(own)
        norm = model.squared_gradient_norm()
    with pytest.raises(AssertionError, match="the host reads"), NoReading():
        float(norm)
    return result.loss


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "1f1b"},
        {"data_parallel_sharding": "optimizer"},
    ],
    ids=str,
)
def test_a_step_leaves_its_numbers_on_the_device(layout: dict[str, Any]) -> None:
    assert all(loss > 0 for loss in run_ranks(unread_step, 2, tiny_settings(**layout), timeout=100.0))
