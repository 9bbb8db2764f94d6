"""Saving: at once, or in the background while training goes on.

In the background a thread copies the live tensors first (staging); training computes its next gradients meanwhile and
waits for the copy only before it changes parameters (`before_update`). Then the thread writes. Ranks of a save talk
through the store, on a channel of its own, so they never meet the collectives of training.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_retro.artifacts.files import TEMPORARY_MARK, flush_file, named_disk_errors, publish_directory
from megatron_retro.artifacts.manifest import FileRecord, file_record, write_manifest
from megatron_retro.checkpoint.dcp import TrimmingSavePlanner
from megatron_retro.checkpoint.directory import (
    KIND,
    STATE_NAME,
    VERSION,
    keep_newest,
    point_to,
    step_directory,
)
from megatron_retro.checkpoint.live_state import as_staged, staging_copy
from megatron_retro.checkpoint.share import SaveShares, report_of, write_share
from megatron_retro.checkpoint.storage import INDEX_NAME, ShardFile, index_text, shard_name
from megatron_retro.runtime.store_channel import StoreChannel
from megatron_retro.runtime.strict_json import json_text


@dataclass(frozen=True)
class Snapshot:
    """Everything of one checkpoint. `state`, `config` and `inputs` are JSON and count on the first rank only."""

    step: int
    tensors: Mapping[str, Tensor]
    true_rows: Mapping[str, int] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)


class Saver:
    """Writes the checkpoints of one run; every rank of the channel (all ranks) has one and calls the same methods."""

    def __init__(
        self,
        run: Path,
        *,
        keep: int = 0,
        channel: StoreChannel | None = None,
        saved: Callable[[int], object] = lambda step: None,
    ) -> None:
        """`saved` is told the step of each checkpoint once it is complete, by the thread that trains."""
        self.run = run
        self._tell_saved = saved
        self._keep = keep
        self._channel = channel or StoreChannel()
        self._rank = self._channel.rank
        self._shares = SaveShares(self._channel)
        self._room: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._step_in_background = 0
        self._staged = threading.Event()
        self._failure: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint and return when it is complete."""
        self.wait()
        self._write(snapshot, snapshot.tensors)
        self._tell_saved(snapshot.step)

    def save_in_background(self, snapshot: Snapshot) -> None:
        """Start a checkpoint; the caller must call `before_update` before it changes any tensor of it."""
        self.wait()
        self._staged.clear()
        self._step_in_background = snapshot.step
        self._thread = threading.Thread(target=self._background, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def before_update(self) -> None:
        """Wait until the tensors of a save in the background are copied."""
        if self._thread is not None:
            self._staged.wait()
            if not self._thread.is_alive():
                self.wait()

    def wait(self) -> None:
        """Wait until a save in the background is complete; raises what went wrong in it."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        self._tell_saved(self._step_in_background)

    def _background(self, snapshot: Snapshot) -> None:
        try:
            staged = self._stage(snapshot.tensors)
            self._staged.set()
            self._write(snapshot, staged)
        except BaseException as failure:
            self._failure = failure
        finally:
            self._staged.set()

    def _stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        staged = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                live = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                room = self._room.get(name)
                if room is None or room.shape != live.shape or room.dtype != live.dtype:
                    room = self._room[name] = staging_copy(tensor)
                room.copy_(live.detach(), non_blocking=True)
                staged[name] = as_staged(tensor, room)
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()  # by name: this thread's own current device is the first
        return staged

    def _write(self, snapshot: Snapshot, tensors: Mapping[str, Tensor]) -> None:
        target, channel = step_directory(self.run, snapshot.step), self._channel
        partial = target.with_name(f"{target.name}{TEMPORARY_MARK}{channel.first(_token)}")
        planner = TrimmingSavePlanner(snapshot.true_rows)
        try:
            channel.first(lambda: self._create(partial))
            items = self._shares.items(tensors, planner)

            def written() -> str:
                with named_disk_errors(target):
                    return report_of(write_share(partial, self._rank, items, planner))

            reports = channel.gather(written)
            channel.first(lambda: self._publish(snapshot, reports, partial, target))
            channel.barrier()  # the first rank, which may keep the store, leaves last
        finally:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _create(self, partial: Path) -> str:
        with named_disk_errors(partial):
            partial.mkdir(parents=True)
        return ""

    def _publish(self, snapshot: Snapshot, reports: Sequence[str], partial: Path, target: Path) -> str:
        written = [json.loads(report) for report in reports]
        files = {
            shard_name(rank): ShardFile.from_json(shard["file"])
            for rank, shard in enumerate(written)
            if "file" in shard
        }
        text = index_text(self._shares.tensors_text([shard["begins"] for shard in written]), files)
        with named_disk_errors(target):
            for name, content in ((STATE_NAME, json_text(snapshot.state) + "\n"), (INDEX_NAME, text)):
                (partial / name).write_text(content, encoding="utf-8")
                flush_file(partial / name)
            records: dict[str, FileRecord] = {name: file.record() for name, file in files.items()}
            records |= {name: file_record(partial / name) for name in (STATE_NAME, INDEX_NAME)}
            write_manifest(  # forces itself and all names of the directory to disk
                partial,
                kind=KIND,
                version=VERSION,
                inputs=snapshot.inputs,
                config=snapshot.config,
                counts=snapshot.counts,
                files=records,
            )
            publish_directory(partial, target)
            point_to(self.run, target, snapshot.step)
            keep_newest(self.run, self._keep)
        return ""


def _token() -> str:
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
