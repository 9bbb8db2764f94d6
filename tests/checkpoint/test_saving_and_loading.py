"""Checkpoints appear whole or not at all, load bit for bit, and damage of every kind is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from megatron_retro.artifacts.manifest import damage
from megatron_retro.checkpoint.dcp import TrimmingSavePlanner
from megatron_retro.checkpoint.directory import LATEST_NAME, complete_checkpoints, run_lock
from megatron_retro.checkpoint.live_state import as_staged
from megatron_retro.checkpoint.loading import load_tensors, open_checkpoint, require_same_model, stored_settings
from megatron_retro.checkpoint.saver import Saver, Snapshot
from megatron_retro.checkpoint.share import share_out
from megatron_retro.config.model import RetroConfig
from megatron_retro.errors import ArtifactError, DamagedArtifact, DistributedError, EnvironmentProblem
from megatron_retro.testing.processes import fork, wait


def tensors(seed: int = 0, rows: int = 300) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.matrix": torch.randn(rows, 70, generator=generator),
        "model.half": torch.randn(8, 3, 5, generator=generator).bfloat16(),
        "model.empty": torch.zeros(0, 4),
        "optimizer.step": torch.tensor(float(seed)),
        "random.00000.cpu": generator.get_state(),
    }


def snapshot(step: int, values: dict[str, Tensor], **more: object) -> Snapshot:
    return Snapshot(step, values, counts={"step": step}, **more)  # type: ignore[arg-type]


def loaded(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    room = {name: torch.full_like(tensor, 7) for name, tensor in like.items()}
    load_tensors(open_checkpoint(path), room)
    return room


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("in_background", [False, True])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, in_background: bool) -> None:
    values = tensors()
    saver = Saver(tmp_path)
    if in_background:
        saver.save_in_background(snapshot(3, values))
        saver.wait()
    else:
        saver.save(snapshot(3, values))
    assert_same(loaded(tmp_path, values), values)
    checkpoint = open_checkpoint(tmp_path)
    assert damage(checkpoint.path, checkpoint.manifest) == []
    assert json.loads((tmp_path / LATEST_NAME).read_text()) == {"checkpoint": "step-00000003", "step": 3}


def test_torch_reads_the_shards_by_its_own_reader(tmp_path: Path) -> None:
    values = tensors()
    Saver(tmp_path).save(snapshot(3, values))
    room = {name: torch.full_like(tensor, 7) for name, tensor in values.items()}
    dcp.load(room, storage_reader=HuggingFaceStorageReader(str(tmp_path / "step-00000003")), no_dist=True)
    assert_same(room, values)


def test_a_save_in_the_background_keeps_the_values_of_its_moment(tmp_path: Path) -> None:
    values = tensors(rows=20_000)
    before = {name: tensor.clone() for name, tensor in values.items()}
    saver = Saver(tmp_path)
    for step in range(3):
        saver.save_in_background(snapshot(step, values))
        saver.before_update()
        values["model.matrix"].add_(1.0)
    saver.wait()
    for step in range(3):
        expected = before["model.matrix"].clone()
        for _ in range(step):
            expected.add_(1.0)
        assert torch.equal(loaded(tmp_path / f"step-{step:08}", values)["model.matrix"], expected)


def test_saves_of_the_same_tensors_are_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    plan = TrimmingSavePlanner.create_local_plan
    monkeypatch.setattr(TrimmingSavePlanner, "create_local_plan", lambda self: planned.append(1) or plan(self))
    saver = Saver(tmp_path)
    for step in range(3):
        saver.save(snapshot(step, tensors(step)))
        assert_same(loaded(tmp_path, tensors(step)), tensors(step))
    assert len(planned) == 1
    saver.save(snapshot(3, tensors(3, rows=301)))
    assert_same(loaded(tmp_path, tensors(3, rows=301)), tensors(3, rows=301))
    assert len(planned) == 2


def test_slices_that_miss_a_part_of_a_tensor_are_refused() -> None:
    half = ("model.a", "F32", [4, 2], [0, 0], [2, 2])
    assert share_out([[half], [("model.a", "F32", [4, 2], [2, 0], [2, 2])]]) == [[0], [0]]
    assert share_out([[half, ("b", "F32", [], [], [])], [("model.a", "F32", [4, 2], [2, 0], [2, 2])]]) == [[0, 1], [0]]
    with pytest.raises(DistributedError, match=r"model\.a"):
        share_out([[half], [half]])


def test_padding_rows_are_not_stored_and_another_padding_loads(tmp_path: Path) -> None:
    table = torch.randn(16, 3)
    Saver(tmp_path).save(snapshot(1, {"model.table": table}, true_rows={"model.table": 11}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.index.sizes["model.table"] == (11, 3)
    room = torch.ones(12, 3)
    load_tensors(checkpoint, {"model.table": room}, {"model.table": 11})
    assert torch.equal(room[:11], table[:11]) and not room[11:].any()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2)
    for step in (1, 2, 10, 30):
        saver.save(snapshot(step, tensors(step)))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000010", "step-00000030"]
    assert_same(loaded(tmp_path, tensors(30)), tensors(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST_NAME, "step-00000010", "step-00000030"]


def test_killed_at_any_moment_the_directory_holds_only_whole_checkpoints(
    tmp_path: Path, count: object, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(5)

    def save_on_and_on() -> None:
        saver = Saver(tmp_path, keep=2)
        first = len(complete_checkpoints(tmp_path)) and open_checkpoint(tmp_path).step
        for step in range(first + 1, first + 1000):
            saver.save_in_background(snapshot(step, tensors(step, rows=3000)))

    for _ in range(count(10, 100)):  # type: ignore[operator]
        process = fork(save_on_and_on)
        time.sleep(draw.uniform(0.01, 0.12))
        os.kill(process, signal.SIGKILL)
        assert wait(process) == -signal.SIGKILL
        for path in complete_checkpoints(tmp_path):
            checkpoint = open_checkpoint(path)
            assert damage(path, checkpoint.manifest) == []
            assert_same(loaded(path, tensors(rows=3000)), tensors(checkpoint.step, rows=3000))
    assert complete_checkpoints(tmp_path)


def test_a_flipped_byte_a_deleted_shard_and_a_cut_index_are_named(tmp_path: Path) -> None:
    values = tensors()
    Saver(tmp_path / "good").save(snapshot(1, values))

    def broken(name: str) -> Path:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        return tmp_path / name / "step-00000001"

    shard = broken("flipped") / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(bytes(content))
    with pytest.raises(DamagedArtifact, match=r"shard-00000\.safetensors: bytes .* changed"):
        loaded(tmp_path / "flipped", values)
    (broken("deleted") / "shard-00000.safetensors").unlink()
    with pytest.raises(DamagedArtifact, match=r"shard-00000\.safetensors is missing"):
        open_checkpoint(tmp_path / "deleted")
    index = broken("cut") / "tensors.json"
    index.write_text(index.read_text()[:-20])
    with pytest.raises(DamagedArtifact, match=r"tensors\.json does not belong to the manifest"):
        open_checkpoint(tmp_path / "cut")
    manifest = broken("edited") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(DamagedArtifact, match="edited or damaged"):
        open_checkpoint(tmp_path / "edited")


def test_a_manifest_of_another_run_is_refused(tmp_path: Path) -> None:
    Saver(tmp_path / "one").save(snapshot(1, tensors(1)))
    Saver(tmp_path / "two").save(snapshot(1, tensors(2)))
    mine, other = tmp_path / "one/step-00000001", tmp_path / "two/step-00000001"
    shutil.copy(other / "manifest.json", mine / "manifest.json")
    with pytest.raises(DamagedArtifact, match="does not belong to the manifest beside it"):
        open_checkpoint(mine)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {os.environ['SIGN_OF_CODE']}",)


def test_no_pickle_is_ever_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign = tmp_path / "code-ran"
    monkeypatch.setenv("SIGN_OF_CODE", str(sign))
    bomb = pickle.dumps(Malicious())
    pickle.loads(bomb)
    assert sign.exists(), "the bomb of this test must work"
    sign.unlink()
    values = tensors()
    Saver(tmp_path / "run").save(snapshot(1, values))
    directory = tmp_path / "run/step-00000001"
    for name in (".metadata", "data.pkl", "state.pt", "random.pickle"):
        (directory / name).write_bytes(bomb)
    assert_same(loaded(tmp_path / "run", values), values)
    (directory / "shard-00000.safetensors").write_bytes(bomb)
    with pytest.raises(DamagedArtifact):
        loaded(tmp_path / "run", values)
    for name in ("tensors.json", "state.json", "manifest.json"):
        (directory / name).write_bytes(bomb)
        with pytest.raises(DamagedArtifact):
            open_checkpoint(directory)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / ".metadata").write_bytes(bomb)
    with pytest.raises(ArtifactError, match="no complete checkpoint"):
        open_checkpoint(foreign)
    assert not sign.exists()


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path: Path) -> None:
    """A real file system of 3 MB where this process may mount one; elsewhere the kernel's file size limit."""
    values = tensors(rows=3000)
    place = tmp_path / "small"
    place.mkdir()
    mounted = os.geteuid() == 0 and os.system(f"mount -t tmpfs -o size=3m tmpfs {place} 2>/dev/null") == 0
    if not mounted:
        pytest.skip("this process may not mount a file system")
    try:
        saver = Saver(place)
        saver.save(snapshot(1, values))
        larger = {**values, "model.more": torch.randn(1_000_000)}
        with pytest.raises(EnvironmentProblem, match="disk is full"):
            saver.save(snapshot(2, larger))
        saver.save_in_background(snapshot(3, larger))
        with pytest.raises(EnvironmentProblem, match="disk is full"):
            saver.wait()
        assert sorted(path.name for path in place.iterdir()) == [LATEST_NAME, "step-00000001"]
        assert_same(loaded(place, values), values)
        saver.save(snapshot(4, values))
        assert open_checkpoint(place).step == 4
    finally:
        os.system(f"umount {place}")


def test_what_is_no_tensor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="not a tensor"):
        Saver(tmp_path).save(snapshot(1, {"model.x": torch.ones(2), "note": "text"}))  # type: ignore[dict-item]
    assert complete_checkpoints(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_another_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    config = {"model": {"num_layers": 4, "hidden_size": 8}, "retro": {"retro_layers": [2, 4]}}
    Saver(tmp_path).save(snapshot(1, tensors(), config=config))
    checkpoint = open_checkpoint(tmp_path)
    require_same_model(checkpoint, {"model": {"num_layers": 4}, "retro": {"retro_layers": (2, 4)}})
    with pytest.raises(ArtifactError, match="--num-layers: 4 there, 6 here"):
        require_same_model(checkpoint, {"model": {"num_layers": 6, "hidden_size": 8}})
    with pytest.raises(ArtifactError, match=r"model\.matrix is \[300, 70\] there, \[300, 71\] here"):
        load_tensors(checkpoint, {"model.matrix": torch.zeros(300, 71)})
    with pytest.raises(ArtifactError, match=r"model\.other is not there"):
        load_tensors(checkpoint, {"model.other": torch.zeros(3)})


def test_two_runs_cannot_have_one_directory_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    def hold() -> None:
        with run_lock(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)

    process = fork(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    with pytest.raises(ArtifactError, match=f"process {process} on"), run_lock(tmp_path):
        pass
    os.kill(process, signal.SIGKILL)
    wait(process)
    with run_lock(tmp_path):
        pass


def test_a_background_save_waits_for_the_device_that_it_copies_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's own device is the first one, wherever the rank trains: waiting there would wait for nothing."""
    waited: list[torch.device | None] = []

    class Stream:
        def synchronize(self) -> None:
            pass

    def current_stream(device: torch.device | None = None) -> Stream:
        waited.append(device)
        return Stream()

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr("megatron_retro.checkpoint.saver.staging_copy", lambda tensor: torch.empty(tensor.shape))
    with FakeTensorMode():
        live = {"model.a": torch.zeros(2, device="cuda:3"), "optimizer.step": torch.zeros(2)}
        Saver(Path("never written"))._stage(live)
    assert waited == [torch.device("cuda", 3)]


def test_what_is_staged_stays_on_the_cpu_whatever_the_mesh_is_of() -> None:
    """It would be on the first GPU of each rank's machine, taken before the copy from the rank's own has arrived."""
    mesh = DeviceMesh("meta", torch.arange(2), _init_backend=False, _rank=1)
    shape, placements = torch.Size((4, 3)), (Shard(0),)
    live = DTensor.from_local(
        torch.empty(2, 3, device="meta"), mesh, placements, run_check=False, shape=shape, stride=(3, 1)
    )
    room = torch.ones(2, 3)
    staged = as_staged(live, room)
    assert isinstance(staged, DTensor)
    assert staged.to_local().data_ptr() == room.data_ptr()
    assert (staged.shape, staged.placements, staged.device_mesh) == (shape, placements, mesh)


def test_a_setting_that_moved_to_another_section_is_no_longer_the_models() -> None:
    stored = {"retro": {"retro_num_neighbors": 1, "retro_random_retrieval_probability": 0.25}}
    checkpoint: Any = SimpleNamespace(path=Path("run"), manifest=SimpleNamespace(config=stored))
    assert stored_settings(checkpoint)[RetroConfig].retro_num_neighbors == 1
    stored["retro"]["retro_nearest_star"] = 1
    with pytest.raises(ArtifactError, match="this version does not know"):
        stored_settings(checkpoint)
