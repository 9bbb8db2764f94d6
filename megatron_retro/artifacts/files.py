"""Writing so that a reader sees the old or the new, never a half.

Everything is written under a temporary name beside its place, flushed to disk, and renamed.
A directory is replaced by exchanging the two names in one system call where the file system can.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from megatron_retro.errors import ArtifactError, EnvironmentProblem, MegatronRetroError

TEMPORARY_MARK = ".partial-"
RETIRED_MARK = ".retired-"
_ABANDONED_SECONDS = 24 * 3600.0
_ATTEMPTS = 10  # at a folder that others make and remove meanwhile
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_AGAIN = "and run the same command again"
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# What the system refuses: why, unless the system's own words say all, and what to do.
_REFUSALS: dict[int, tuple[str, str]] = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), ("the disk is full", f"free space or choose another directory, {_AGAIN}")
    ),
    **dict.fromkeys(_CLOSED, ("", f"ask for the permission, or give another path, {_AGAIN}")),
    errno.EFBIG: ("a file is too large", f"raise the limit (`ulimit -f`) or choose another file system, {_AGAIN}"),
    errno.EIO: ("the disk fails", f"look at what `dmesg` says of it, choose another disk, {_AGAIN}"),
    errno.ESTALE: ("the file server lost a file", f"look at the mount, {_AGAIN}"),
    errno.EMFILE: ("this process has too many open files", f"raise the limit (`ulimit -n`), {_AGAIN}"),
    errno.ENFILE: ("this machine has too many open files", f"end other programs, {_AGAIN}"),
    errno.ENOMEM: ("memory ran out", f"take fewer workers or smaller batches, or end other programs, {_AGAIN}"),
    errno.EAGAIN: ("no thread or process may start", f"raise the limits (`ulimit -u`, `ulimit -v`), {_AGAIN}"),
}
# How C++, torch's allocators and the threads of Python say that memory ran out.
_NO_MEMORY = ("bad_alloc", "can't allocate memory", "not enough memory", "can't start new thread")


@cache
def this_host() -> str:
    """Tells processes apart whose numbers mean the same: another host, another boot or container is another value."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no reader takes for finished."""
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{this_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def fresh_name(path: Path) -> Path:
    """A temporary name, once what killed writers of `path` left is gone."""
    remove_leftovers(path.parent, glob.escape(path.name))
    return temporary_name(path)


def has_size(path: Path, size: int) -> bool:
    """Whether a file is there and has its size; another worker may rename or remove it at this moment."""
    try:
        return path.stat().st_size == size
    except (FileNotFoundError, NotADirectoryError):
        return False


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


def require_room(folder: Path, needed: int) -> None:
    """Refuse to begin what will not find the room that it needs."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentProblem(
            f"{folder} has no room for one checkpoint",
            got=f"{free / 1e9:.3g} GB free",
            expected=f"{needed / 1e9:.3g} GB",
            fix="free space, or give another --save, and run the same command again",
        )


def make_folder(path: Path) -> None:
    """Make a folder and those above it, or say why there can be none."""
    if path.parts and path.parts[0].endswith(":"):  # what `Path` leaves of a URL
        raise EnvironmentProblem(f"{path} lies in an object store, which is only read", fix="give a path on a disk")
    with named_disk_errors(path):
        for left in reversed(range(_ATTEMPTS)):
            try:
                path.mkdir(parents=True, exist_ok=True)
                return
            except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
                if left == 0:
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
        partial = fresh_name(path)
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
        partial = fresh_name(path)
        partial.mkdir()
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    file.chmod(0o666 & ~_umask())  # writers of libraries have modes of their own
                flush_file(file)
            flush_directory(partial)
            publish_directory(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _umask() -> int:
    """The bits that this process leaves out of the modes of new files."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    except (OSError, StopIteration):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


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
    _remove_retired(path.parent, glob.escape(path.name))
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
    """Turn the operating system's refusals into errors that say what to do. `path`: what is written."""
    try:
        yield
    except MegatronRetroError:
        raise
    except Exception as error:
        problem = disk_problem(error, path)
        if problem is None:
            raise
        raise problem from error


def disk_problem(error: BaseException, path: Path | None = None) -> EnvironmentProblem | None:
    """What a user is told of a refusal of the system, also inside a library's error; None for other errors.

    `path`: what was to be written. A refusal that names another file, or one below it, is of that file.
    """
    refusal = _refusal(error)
    if refusal is None:
        return None
    code, named = refusal
    reason, fix = _REFUSALS[code]
    if path is not None and (named is None or _belongs_to(named, path)):
        what = "cannot be written" if code in _CLOSED else "was not written, what was there before is untouched"
        fix = "give a directory that you may write" if code in _CLOSED else fix
        what = f"{path} {what}"
    elif named is not None:
        what = f"{named} cannot be {'opened' if code in _CLOSED else 'read or written'}"
    elif code in (errno.ENOMEM, errno.EAGAIN):
        what, reason = reason, ""
    else:
        what = "a file could not be read or written"
    return EnvironmentProblem(f"{reason}: {what}" if reason else what, got=os.strerror(code), fix=fix)


def _refusal(error: BaseException) -> tuple[int, str | None] | None:
    """The number and the file of what the system refused: of an error, of its cause, or in the words of a library."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            if found.errno in _REFUSALS:
                return found.errno, None if found.filename is None else os.fsdecode(found.filename)
        elif isinstance(found, MemoryError):
            return errno.ENOMEM, None
        elif not isinstance(found, MegatronRetroError):
            said = next((code for code in _REFUSALS if os.strerror(code) in str(found)), None)
            if said is None and any(words in str(found) for words in _NO_MEMORY):
                said = errno.ENOMEM
            if said is not None:
                return said, None
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return None


def _belongs_to(named: str, path: Path) -> bool:
    return named.startswith(str(path)) or str(path).startswith(named)


def remove_leftovers(directory: Path, pattern: str = "*") -> int:
    """Delete what killed processes left in a directory, temporary or replaced; returns how many.

    The number of a process says something on its own host only; what another host left must be a day old.
    """
    removed = _remove_retired(directory, pattern)
    for path in directory.glob(f"{pattern}{TEMPORARY_MARK}*"):
        host, process, *_ = [*path.name.rsplit(TEMPORARY_MARK, 1)[1].split("-"), "", ""]
        if host == this_host() and process.isdigit():
            is_left = not Path(f"/proc/{process}").exists()
        else:
            is_left = time.time() - _changed_at(path) > _ABANDONED_SECONDS
        if is_left:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            removed += 1
    return removed


def _remove_retired(directory: Path, pattern: str) -> int:
    """Delete directories that others have replaced: between two renames, the old one may still be wanted."""
    removed = 0
    for path in directory.glob(f"{pattern}{RETIRED_MARK}*"):
        if path.with_name(path.name.rpartition(RETIRED_MARK)[0]).exists():
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
    return removed


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
