"""The checkpoints of one run: `step-00000040/` directories that appear whole, and a pointer to the newest.

A directory gets its name by one rename after its manifest is on disk, so whatever has the name is complete. One run
holds the directory: by a lock that the kernel drops when its holder dies, however it dies.
`latest.json` is for other programs; ours look at the directories themselves.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_retro.artifacts.files import (
    RETIRED_MARK,
    TEMPORARY_MARK,
    flush_directory,
    make_folder,
    named_disk_errors,
    remove_leftovers,
    write_file,
)
from megatron_retro.artifacts.manifest import MANIFEST_NAME
from megatron_retro.errors import ArtifactError, EnvironmentProblem
from megatron_retro.runtime.strict_json import json_text

KIND = "checkpoint"
VERSION = 1
LATEST_NAME = "latest.json"
STATE_NAME = "state.json"
DAMAGED_MARK = ".damaged-"
_NAME = re.compile(r"step-(\d{8})")


def step_directory(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / f"step-{step:08}"


def complete_checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST_NAME).is_file()]
    return sorted(found)


def resolve_checkpoint(path: Path) -> Path:
    """A step directory itself, or the newest complete one of a run's directory."""
    if (path / MANIFEST_NAME).is_file():
        return path
    found = complete_checkpoints(path)
    if not found:
        raise ArtifactError(
            f"{path} holds no complete checkpoint",
            expected=f"a directory with {MANIFEST_NAME}, or a run's directory with step-NNNNNNNN inside",
            fix="check --load; checkpoints of other programs are read by `megatron-retro convert`",
        )
    return found[-1]


def point_to(run: Path, checkpoint: Path, step: int) -> None:
    """Say which checkpoint is the newest."""
    write_file(run / LATEST_NAME, json_text({"checkpoint": checkpoint.name, "step": step}) + "\n")


def point_to_newest(run: Path) -> None:
    """The same after a kill between a checkpoint and its pointer."""
    for newest in complete_checkpoints(run)[-1:]:
        point_to(run, newest, int(newest.name.rpartition("-")[2]))


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; its name vanishes before its content does."""
    retired = path.with_name(f"{path.name}{RETIRED_MARK}{uuid.uuid4().hex[:8]}")
    os.rename(path, retired)
    flush_directory(path.parent)
    shutil.rmtree(retired, ignore_errors=True)  # somebody may read it; the next run on it removes what is left


def keep_newest(run: Path, count: int) -> None:
    """Remove all but the newest `count` complete checkpoints; 0 keeps all."""
    for path in complete_checkpoints(run)[: -count if count else 0]:
        remove_checkpoint(path)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that no run takes it up again."""
    aside = path.with_name(f"{path.name}{DAMAGED_MARK}{uuid.uuid4().hex[:8]}")
    os.rename(path, aside)
    flush_directory(path.parent)
    return aside


def clear_unfinished(run: Path) -> int:
    """Delete what killed runs left unfinished; only for whoever holds the run's lock. Returns how many."""
    count = remove_leftovers(run, "*.*")
    for mark in (TEMPORARY_MARK, RETIRED_MARK):
        for path in run.glob(f"step-*{mark}*"):
            shutil.rmtree(path, ignore_errors=True)
            count += 1
    return count


LOCK_NAME = "run.lock"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the directory of a run; a second run on it is refused at once."""
    make_folder(run)
    with named_disk_errors(run):
        descriptor = os.open(run / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise ArtifactError(
                f"{run} belongs to a run that is going on", got=holder, fix="wait for it, or give another --save"
            ) from None
        except OSError as error:
            raise EnvironmentProblem(
                f"the file system of {run} cannot lock a file, so two runs could write there",
                got=error.strerror,
                fix="mount it with locks (Lustre: -o flock; NFS: with lockd), or give another --save",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
