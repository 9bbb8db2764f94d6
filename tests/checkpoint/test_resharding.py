"""A state saved on any layout loads on any other with the same bits, moments included."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from megatron_retro.checkpoint import loading
from megatron_retro.checkpoint.loading import load_tensors, open_checkpoint
from megatron_retro.checkpoint.saver import Saver, Snapshot
from megatron_retro.errors import DamagedArtifact
from megatron_retro.runtime.store_channel import open_channel
from megatron_retro.testing.processes import exit_code_of, run_ranks
from megatron_retro.testing.tiny_corpus import differences, index_reads, write_tiny_corpus
from megatron_retro.training.program import pretrain

SIZES = (1, 2, 4)
Layout = tuple[int, int, int]
LAYOUTS: list[Layout] = [
    layout for layout in itertools.product(SIZES, SIZES, SIZES) if layout[0] * layout[1] * layout[2] <= 4
]
TRUE_ROWS = 9


def whole(layer: int) -> dict[str, Tensor]:
    """Sizes that no layout divides evenly, and a table with padding."""
    generator = torch.Generator().manual_seed(layer)
    values = {
        f"model.{layer}.up": torch.randn(13, 6, generator=generator),
        f"model.{layer}.down": torch.randn(6, 13, generator=generator),
        f"model.{layer}.norm": torch.randn(5, generator=generator),
        f"model.{layer}.half": torch.randn(8, 3, 2, generator=generator).bfloat16(),
        f"optimizer.{layer}.step": torch.tensor(float(layer)),
        f"model.{layer}.table": torch.randn(16, 4, generator=generator),
    }
    values[f"model.{layer}.table"][TRUE_ROWS:] = 0
    return values


def cut(name: str) -> tuple[Placement, Placement]:
    """Over data ranks and tensor ranks."""
    kind = name.split(".")[-1]
    places: dict[str, tuple[Placement, Placement]] = {
        "up": (Shard(1), Shard(0)),
        "down": (Shard(0), Shard(1)),
        "norm": (Shard(0), Replicate()),
        "half": (Replicate(), Shard(0)),
        "table": (Shard(1), Shard(0)),
    }
    return places.get(kind, (Replicate(), Replicate()))


def mine(layout: Layout, mesh: DeviceMesh, fill: float | None = None) -> dict[str, Any]:
    """This rank's part of four layers; other values in place of the real ones with `fill`."""
    stages, stage, part = layout[0], mesh.get_local_rank("pipeline"), mesh["data", "tensor"]
    found: dict[str, Any] = {}
    for layer in range(4):
        if layer % stages == stage:
            for name, value in whole(layer).items():
                tensor = value if fill is None else torch.full_like(value, fill)
                found[name] = distribute_tensor(tensor, part, cut(name)) if tensor.dim() else tensor
    return found


def rows(names: dict[str, Any]) -> dict[str, int]:
    return {name: TRUE_ROWS for name in names if name.endswith("table")}


def test_every_layout_loads_what_every_other_saved(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    pairs = list(itertools.product(LAYOUTS, LAYOUTS))
    random.Random(0).shuffle(pairs)
    pairs = pairs[: count(8, len(pairs))]

    def on_a_rank() -> int:
        meshes = {
            layout: DeviceMesh(
                "cpu",
                torch.arange(layout[0] * layout[1] * layout[2]).view(layout),
                mesh_dim_names=("pipeline", "data", "tensor"),
            )
            for layout in LAYOUTS
        }
        groups = {size: dist.new_group(list(range(size)), backend="gloo") for size in SIZES}
        channels = {size: open_channel("test", group) for size, group in groups.items() if dist.get_rank() < size}
        for layout in sorted({source for source, _ in pairs}):
            size = layout[0] * layout[1] * layout[2]
            if dist.get_rank() < size:
                tensors = mine(layout, meshes[layout])
                path = tmp_path / "-".join(map(str, layout))
                Saver(path, channel=channels[size]).save(Snapshot(1, tensors, rows(tensors), counts={"step": 1}))
            dist.barrier()
        checked = 0
        for source, target in pairs:
            size = target[0] * target[1] * target[2]
            if dist.get_rank() < size:
                tensors = mine(target, meshes[target], fill=7.0)
                checkpoint = open_checkpoint(tmp_path / "-".join(map(str, source)))
                load_tensors(checkpoint, tensors, rows(tensors), channels[size])
                expected = mine(target, meshes[target])
                for name, tensor in tensors.items():
                    local, right = tensor, expected[name]
                    if tensor.dim():
                        local, right = tensor.to_local(), right.to_local()
                    assert torch.equal(local, right), f"{source} -> {target}: {name}"
                    checked += 1
            dist.barrier()
        return checked

    assert run_ranks(on_a_rank, 4, timeout=250)[0] >= 6 * len(pairs)


def test_one_rank_reads_the_index_and_looks_for_the_shards(tmp_path: Path) -> None:
    whole_layer = {"model.a": torch.arange(6.0).view(3, 2), "model.b": torch.ones(2)}
    Saver(tmp_path / "run").save(Snapshot(1, whole_layer, counts={"step": 1}))
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    (tmp_path / "cut/step-00000001/tensors.json").write_text("{}")

    def on_a_rank() -> tuple[int, bool]:
        channel = open_channel("test")
        with index_reads() as read:
            checkpoint = loading.open_together(tmp_path / "run", channel, torch.device("cpu"))
            tensors = {"model.b": torch.zeros(2), "model.a": torch.zeros(3, 2)}
            load_tensors(checkpoint, tensors, None, channel)
            with pytest.raises(DamagedArtifact, match="does not belong to the manifest"):
                loading.open_together(tmp_path / "cut", channel, torch.device("cpu"))
        return len(read), all(torch.equal(tensors[name], whole_layer[name]) for name in tensors)

    assert run_ranks(on_a_rank, 3) == [(1, True), (0, True), (0, True)]


def test_a_real_run_moves_through_layouts_without_changing_a_bit(
    tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """Loaded and saved again without a step in between: weights, moments and step counts stay what they were."""
    corpus = write_tiny_corpus(tmp_path / "corpus")
    more: dict[str, Any] = {"train_iters": 3, "global_batch_size": 8, "eval_iters": 0, "num_layers": 4}
    more |= {"retro_layers": [2, 4], "save": str(tmp_path / "run")}
    assert exit_code_of(lambda: pretrain(corpus.settings(**more))) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    layouts: list[tuple[int, dict[str, Any]]] = [
        (4, {"tensor_model_parallel_size": 2, "data_parallel_sharding": "full"}),
        (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (1, {}),
        (4, {"data_parallel_sharding": "optimizer"}),
        (4, {"pipeline_model_parallel_size": 4}),
        (2, {"pipeline_model_parallel_size": 2, "data_parallel_sharding": "gradients"}),
        (4, {"tensor_model_parallel_size": 4}),
        (1, {}),
    ]
    for size, layout in layouts[: count(2, len(layouts))]:
        settings = corpus.settings(**more, **layout)
        run_ranks(lambda settings=settings: pretrain(settings), size, initialize=False, timeout=200)
        for prefix in ("model.", "optimizer."):
            assert differences(tmp_path / "first", tmp_path / "run", prefix=prefix) == [], layout
