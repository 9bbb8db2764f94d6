"""Writing so that a reader sees the old or the new, never a half.

Everything is written under a temporary name beside its place, flushed to disk, and renamed.
A directory is replaced by exchanging the two names in one system call where the file system can.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_retro.errors import ArtifactError, EnvironmentProblem

TEMPORARY_MARK = ".partial-"
RETIRED_MARK = ".retired-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no reader takes for finished."""
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def flush_file(path: Path) -> None:
    """Force a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    """Force a directory's names to disk."""
    flush_file(path)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, or say why there can be none."""
    with named_disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise EnvironmentProblem(
                f"no folder can be made at {path}",
                got=error.strerror,
                fix="give a path below a folder, not below a file",
            ) from error


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file atomically."""
    data = content.encode() if isinstance(content, str) else content
    with new_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to fill; it becomes `path` when the block ends well and vanishes when it does not."""
    make_folder(path.parent)
    with named_disk_errors(path):
        partial = temporary_name(path)
        try:
            yield partial
            flush_file(partial)
            os.replace(partial, path)
            flush_directory(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary directory to fill; it becomes `path` when the block ends well.

    An existing `path` is refused unless `replace`; then readers see the old one until the new one is whole.
    """
    with named_disk_errors(path):
        if path.exists() and not replace:
            raise ArtifactError(f"{path} exists already", fix="remove it, or give another path")
        make_folder(path.parent)
        partial = temporary_name(path)
        partial.mkdir()
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                flush_file(file)
            flush_directory(partial)
            publish_directory(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def publish_directory(finished: Path, path: Path) -> None:
    """Give a finished directory its name; what had the name before is removed."""
    try:
        os.rename(finished, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _exchange(finished, path):
            shutil.rmtree(finished)
        else:
            retired = path.with_name(path.name + RETIRED_MARK + uuid.uuid4().hex[:8])
            os.rename(path, retired)
            os.rename(finished, path)
            shutil.rmtree(retired)
    flush_directory(path.parent)


def recover_directory(path: Path) -> None:
    """Bring back the old directory if a kill fell between the two renames of a file system without exchange."""
    if path.exists():
        return
    retired = sorted(path.parent.glob(path.name + RETIRED_MARK + "*"))
    if retired:
        os.rename(retired[-1], path)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the file system or the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    status = library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


@contextmanager
def named_disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to do."""
    try:
        yield
    except OSError as error:
        problem = disk_problem(error, path)
        if problem is None:
            raise
        raise problem from error


def disk_problem(error: OSError, path: Path | None = None) -> EnvironmentProblem | None:
    """What a user is told of a full disk or a closed door; None for other errors. `path`: what was written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{path} was not written, what was there before is untouched" if path else "what was written is cut"
        return EnvironmentProblem(
            f"the disk is full: {what}",
            fix="free space or choose another directory, and run the same command again",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        if path:
            return EnvironmentProblem(
                f"{path} cannot be written", got=error.strerror, fix="give a directory that you may write"
            )
        if error.filename:
            return EnvironmentProblem(f"{error.filename} cannot be opened", got=error.strerror)
    return None


def remove_leftovers(directory: Path) -> int:
    """Delete temporary files that killed processes of this host left in a directory; returns how many."""
    removed = 0
    for path in directory.glob(f"*{TEMPORARY_MARK}*"):
        owner = path.name.rsplit(TEMPORARY_MARK, 1)[1].split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            removed += 1
    return removed
