"""One run per directory: a lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_retro.artifacts.files import make_folder, named_disk_errors
from megatron_retro.errors import ArtifactError

LOCK_NAME = "run.lock"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the directory of a run; a second run on it is refused at once."""
    make_folder(run)
    with named_disk_errors(run):
        descriptor = os.open(run / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise ArtifactError(
                f"{run} belongs to a run that is going on", got=holder, fix="wait for it, or give another --save"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
