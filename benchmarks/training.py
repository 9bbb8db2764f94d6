"""Overhead of the loop, rates of checkpoints against the bare disk, stall of a background save, memory of a load.

Raw rates, torch's own storage and ours take turns in the same rounds on the same bytes; what was loaded is compared
bit for bit before anything is timed.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_by_torch
from torch.distributed.checkpoint.state_dict_saver import save as save_by_torch
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_retro.artifacts.block_checksums import BLOCK_BYTES
from megatron_retro.checkpoint.loading import load_tensors, open_checkpoint
from megatron_retro.checkpoint.saver import Saver, Snapshot
from megatron_retro.checkpoint.shard_files import tensor_bytes
from megatron_retro.runtime.run_log import read_run_log
from megatron_retro.runtime.store_channel import open_channel
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, median_ratio
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.tiny_corpus import write_tiny_corpus
from megatron_retro.training.program import pretrain

TENSOR_BYTES = 16 << 20


def run(quick: bool) -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="training-benchmark-", dir=os.environ.get("BENCHMARK_DIR")) as name:
        room = Path(name)
        return [
            *loop_overhead(room, 20 if quick else 60),
            *disk_rates(room, (64 if quick else 1024) << 20, 3 if quick else 7),
            *background_stall(room, (64 if quick else 256) << 20, 2 if quick else 5),
            *load_memory(room, (128 if quick else 512) << 20),
        ]


def loop_overhead(room: Path, steps: int) -> list[Figure]:
    """Everything but forward, backward and optimizer, on the tiny Retro preset's sizes, observers and log included."""
    corpus = write_tiny_corpus(room / "corpus", pairs=200)
    settings = corpus.settings(
        save=str(room / "run"), train_iters=steps, eval_iters=0, num_workers=1, log_interval=10,
        num_layers=4, hidden_size=128, seq_length=256, swiglu=True, disable_bias_linear=True,
        untie_embeddings_and_output_weights=True, apply_layernorm_1p=True, rotary_percent=0.5,
        retro_layers=[2, 4], micro_batch_size=4, global_batch_size=8, lr=1e-3,
    )  # fmt: skip
    pretrain(settings)
    records = read_run_log(room / "run").steps[5:]
    work = ("forward_backward", "optimizer")
    shares = [1 - sum(record.seconds[name] for name in work) / record.step_seconds for record in records]
    seconds = statistics.median(record.step_seconds for record in records)
    return [
        Figure("loop overhead of the tiny preset, share of a step", statistics.median(shares), "", 0.03, LOWER),
        Figure("step of the tiny preset", 1000 * seconds, "ms"),
    ]


def state(num_bytes: int) -> dict[str, Tensor]:
    """Random tensors of 16 MB."""
    generator = torch.Generator().manual_seed(0)
    count = num_bytes // TENSOR_BYTES
    return {f"model.{number}": torch.randn(2048, TENSOR_BYTES // 8192, generator=generator) for number in range(count)}


def forget_pages(path: Path) -> None:
    """Make the next read of a tree a cold one."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def disk_rates(room: Path, num_bytes: int, rounds: int) -> list[Figure]:
    """Saving and verified loading against write + fsync and a cold read of the same bytes."""
    values = state(num_bytes)
    room_for_load = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    paths = {name: room / f"disk-{name}" for name in ("raw", "ours", "torch")}

    def load_ours() -> None:
        load_tensors(open_checkpoint(paths["ours"]), room_for_load)

    saves: dict[str, Callable[[], object]] = {
        "raw": lambda: write_raw(paths["raw"], values),
        "ours": lambda: Saver(paths["ours"], keep=1).save(Snapshot(1, values, counts={"step": 1})),
        "torch": lambda: save_by_torch(values, checkpoint_id=str(paths["torch"]), no_dist=True),
    }
    loads: dict[str, Callable[[], object]] = {
        "raw": lambda: read_raw(paths["raw"], room_for_load),
        "ours": load_ours,
        "torch": lambda: load_by_torch(room_for_load, checkpoint_id=str(paths["torch"]), no_dist=True),
    }
    saved = take_turns(saves, lambda name: shutil.rmtree(paths[name], ignore_errors=True), rounds)
    for load in loads.values():
        for tensor in room_for_load.values():
            tensor.zero_()
        load()
        if not all(torch.equal(tensor, room_for_load[name]) for name, tensor in values.items()):
            raise AssertionError("what was loaded is not what was saved")
    loaded = take_turns(loads, lambda name: forget_pages(paths[name]), rounds)
    for path in paths.values():
        shutil.rmtree(path, ignore_errors=True)
    figures = []
    for what, times, target in (("save", saved, 0.9), ("verified load", loaded, 0.85)):
        raw, theirs = times["raw"], f"{what} by torch's default (unverified), share of the raw rate"
        figures += [
            Figure(f"{what}, share of the raw rate", median_ratio(raw, times["ours"]), "", target),
            Figure(theirs, median_ratio(raw, times["torch"]), ""),
            Figure(f"raw rate for {what}", num_bytes / 1e9 / statistics.median(raw), "GB/s"),
        ]
    return figures


def take_turns(
    candidates: dict[str, Callable[[], object]], prepare: Callable[[str], object], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each candidate in every round; what prepares it is not counted, nor is the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, candidate in candidates.items():
            prepare(name)
            start = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def write_raw(path: Path, values: dict[str, Tensor]) -> None:
    """The bytes, in one file, forced to disk."""
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / "raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for tensor in values.values():
        data, done = tensor_bytes(tensor), 0
        while done < len(data):
            done += os.write(descriptor, data[done : done + 8 * BLOCK_BYTES])
    os.fsync(descriptor)
    os.close(descriptor)


def read_raw(path: Path, values: dict[str, Tensor]) -> None:
    """The bytes, straight into place, in the same blocks as ours."""
    descriptor = os.open(path / "raw", os.O_RDONLY)
    for tensor in values.values():
        data, done = tensor_bytes(tensor), 0
        while done < len(data):
            done += os.readv(descriptor, [data[done : done + BLOCK_BYTES]])
    os.close(descriptor)


def background_stall(room: Path, num_bytes: int, rounds: int) -> list[Figure]:
    """What training waits for: the call, and what is left of the copy when the next update is due."""
    values = state(num_bytes)
    sync, background = Saver(room / "sync", keep=1), Saver(room / "background", keep=1)
    matrix = torch.randn(1024, 1024)
    ratios, waits = [], []
    for number in range(rounds + 1):
        start = time.perf_counter()
        sync.save(Snapshot(number, values, counts={"step": number}))
        whole = time.perf_counter() - start
        start = time.perf_counter()
        background.save_in_background(Snapshot(number, values, counts={"step": number}))
        called = time.perf_counter() - start
        until = time.perf_counter() + 2 * whole
        while time.perf_counter() < until:
            matrix @ matrix
        start = time.perf_counter()
        background.before_update()
        stalled = called + time.perf_counter() - start
        background.wait()
        if number:  # the first one makes the room that later ones reuse
            ratios.append(stalled / whole)
            waits.append(stalled)
    return [
        Figure("stall of a background save, share of a synchronous one", statistics.median(ratios), "", 0.02, LOWER),
        Figure("stall of a background save", 1000 * statistics.median(waits), "ms"),
    ]


def load_memory(room: Path, num_bytes: int) -> list[Figure]:
    """Memory beyond the loaded state when four ranks' shards, cut along columns, become one process's rows."""
    largest = num_bytes // 4
    shape = (1024, largest // 4096)
    names = [f"model.{number}" for number in range(4)]

    def save() -> None:
        mesh = dist.device_mesh.init_device_mesh("cpu", (4,))
        tensors = {name: distribute_tensor(torch.randn(shape), mesh, [Shard(1)]) for name in names}
        Saver(room / "cut", channel=open_channel("saving")).save(Snapshot(1, tensors, counts={"step": 1}))

    def load() -> Any:
        tensors = {name: torch.ones(shape) for name in names}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load_tensors(open_checkpoint(room / "cut"), tensors)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

    run_ranks(save, 4, timeout=200)
    beyond = int(run_ranks(load, 1, timeout=200)[0])
    allowed = 2 * largest + 100e6
    return [
        Figure("memory of a resharding load beyond the state", beyond / 1e6, "MB", allowed / 1e6, LOWER),
        Figure("its largest tensor", largest / 1e6, "MB"),
    ]


if __name__ == "__main__":
    benchmark_main(__doc__, run)
