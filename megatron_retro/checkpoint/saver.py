"""Saving: at once, or in the background while training goes on.

In the background a thread copies the live tensors first (staging); training computes its next gradients meanwhile and
waits for the copy only before it changes parameters (`before_update`). Then the thread writes. All collectives of a
save run on a process group of their own, so they never meet those of training.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from megatron_retro.artifacts.files import TEMPORARY_MARK, flush_file, named_disk_errors, publish_directory
from megatron_retro.artifacts.manifest import FileRecord, file_record, write_manifest
from megatron_retro.checkpoint.dcp import TrimmingSavePlanner, named_failure
from megatron_retro.checkpoint.directory import (
    KIND,
    STATE_NAME,
    VERSION,
    keep_newest,
    point_to,
    step_directory,
)
from megatron_retro.checkpoint.live_state import as_staged, staging_copy
from megatron_retro.checkpoint.storage import INDEX_NAME, ShardWriter
from megatron_retro.errors import MegatronRetroError
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
    """Writes the checkpoints of one run; every rank of `group` (all ranks) has one and calls the same methods."""

    def __init__(
        self,
        run: Path,
        *,
        keep: int = 0,
        group: dist.ProcessGroup | None = None,
        saved: Callable[[int], object] = lambda step: None,
    ) -> None:
        """`saved` is told the step of each checkpoint once it is complete, by the thread that trains."""
        self.run = run
        self._tell_saved = saved
        self._keep = keep
        self._group = None if group is None or dist.get_world_size(group) == 1 else group
        self._rank = 0 if self._group is None else dist.get_rank(self._group)
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
        target = step_directory(self.run, snapshot.step)
        partial = target.with_name(f"{target.name}{TEMPORARY_MARK}{self._agreed(_token())}")
        try:
            self._agree_on(lambda: self._create(partial))
            writer = ShardWriter(partial, self._rank)
            planner = TrimmingSavePlanner(snapshot.true_rows)
            with named_failure(target), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
                save_distributed(
                    dict(tensors),
                    storage_writer=writer,
                    planner=planner,
                    process_group=self._group,
                    no_dist=self._group is None,
                )
            self._agree_on(lambda: self._publish(snapshot, writer, partial, target))
        finally:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _create(self, partial: Path) -> None:
        with named_disk_errors(partial):
            partial.mkdir(parents=True)

    def _publish(self, snapshot: Snapshot, writer: ShardWriter, partial: Path, target: Path) -> None:
        with named_disk_errors(target):
            (partial / STATE_NAME).write_text(json_text(snapshot.state) + "\n", encoding="utf-8")
            for name in (STATE_NAME, INDEX_NAME):
                flush_file(partial / name)
            records: dict[str, FileRecord] = {name: file.record() for name, file in writer.files.items()}
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

    def _agreed(self, value: str) -> str:
        """The first rank's value, on every rank."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=dist.get_global_rank(self._group, 0), group=self._group)
        return values[0]

    def _agree_on(self, action: Any) -> None:
        """Do something on the first rank; if it fails there, it fails everywhere."""
        failure: Exception | None = None
        if self._rank == 0:
            try:
                action()
            except Exception as error:
                failure = error
        message = self._agreed("" if failure is None else str(failure))
        if failure is not None:
            raise failure
        if message:
            raise MegatronRetroError(message)


def _token() -> str:
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
