"""What a file system may refuse beside a checkpoint that is complete, and what it must be able to do."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from megatron_retro.checkpoint.directory import clear_unfinished, remove_checkpoint, run_lock
from megatron_retro.errors import EnvironmentProblem


def test_an_old_checkpoint_that_somebody_reads_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS an open file keeps its folder; what is left goes with the next run."""
    old = tmp_path / "step-00000001"
    old.mkdir()
    (old / ".nfs0001").touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", refuse)
        patched.setattr(os, "unlink", refuse)
        remove_checkpoint(old)
    assert not old.exists() and list(tmp_path.iterdir()) != []
    assert clear_unfinished(tmp_path) == 1 and list(tmp_path.iterdir()) == []


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(EnvironmentProblem, match=r"cannot lock a file(.|\n)*-o flock"), run_lock(tmp_path):
        pass
