"""The folder in which the processes of a node keep what they read from object stores, within a bound.

A lock is held while a file is written, so the bound holds to the byte. The blocks that were used longest ago make room;
whole copies of small files stay.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from megatron_retro.artifacts.files import TEMPORARY_MARK, make_folder, named_disk_errors
from megatron_retro.errors import ConfigError, EnvironmentProblem

PATH_VARIABLE, GIGABYTES_VARIABLE = "MEGATRON_RETRO_OBJECT_CACHE", "MEGATRON_RETRO_OBJECT_CACHE_GB"
DEFAULT_GIGABYTES = 64.0
BLOCK_ENDING = ".block"
_COUNT = "used"


def use_cache(object_storage_cache_path: str | None, object_storage_cache_gb: float) -> None:
    """Choose the cache of this process and of those that it starts; without a path the environment's stays."""
    if object_storage_cache_path is not None:
        os.environ[PATH_VARIABLE] = object_storage_cache_path
        os.environ[GIGABYTES_VARIABLE] = str(object_storage_cache_gb)


@dataclass(frozen=True)
class CacheFolder:
    """A folder that holds at most so many bytes."""

    path: Path
    most_bytes: int

    @classmethod
    def chosen(cls, url: str) -> CacheFolder:
        """The one that flags or the environment name; `url`: what it is needed for."""
        path = os.environ.get(PATH_VARIABLE)
        if not path:
            raise ConfigError(
                f"{url} is read through a cache on a disk of this machine, and none is named",
                fix=f"give --object-storage-cache-path FOLDER, or set {PATH_VARIABLE}",
            )
        gigabytes = float(os.environ.get(GIGABYTES_VARIABLE, DEFAULT_GIGABYTES))
        make_folder(Path(path))
        return cls(Path(path), int(gigabytes * 1e9))

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Hold the lock while the caller writes so many bytes, for which there is room then."""
        with named_disk_errors(self.path), (self.path / _COUNT).open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            told = stream.read()
            used = int(told) if told.isdigit() else self.most_bytes
            if used + size > self.most_bytes:
                used = self._after_dropping(size)
            stream.truncate(0)
            stream.write(b"%d" % (used + size))  # before it is so: a process that is killed counts too much
            stream.flush()
            yield

    def _after_dropping(self, size: int) -> int:
        """Count what there is, and drop the blocks that were used longest ago until there is room; bytes that stay."""
        files = []
        for path in self.path.rglob("*"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                if S_ISREG(facts.st_mode) and path.name != _COUNT:
                    files.append((facts.st_mtime_ns, facts.st_size, path))
        used = sum(bytes_ for _, bytes_, _ in files)
        blocks = [file for file in files if BLOCK_ENDING in file[2].name]
        blocks.sort(key=lambda file: (TEMPORARY_MARK not in file[2].name, file[0]))  # first, what killed writers left
        for _, bytes_, path in blocks:
            if used + size <= self.most_bytes - self.most_bytes // 16 and TEMPORARY_MARK not in path.name:
                break
            path.unlink(missing_ok=True)
            used -= bytes_
        if used + size > self.most_bytes:
            raise EnvironmentProblem(
                f"the cache {self.path} is too small for what is read",
                got=f"--object-storage-cache-gb {self.most_bytes / 1e9:g}",
                expected=f"{(used + size) / 1e9:.3g} at least",
                fix="give it more, or remove what no run uses",
            )
        return used
