"""Where artifacts are opened: what a manifest records is verified before it is believed.

A file below 64 MB is read whole and compared with its checksum, on every path that opens its artifact. A larger one
must have its size; whoever reads it verifies its blocks as it reads, or all of it beside the work (`Verification`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from pathlib import Path

from megatron_retro.artifacts.manifest import FileRecord, Manifest, read_manifest, unchanged
from megatron_retro.errors import DamagedArtifact, MegatronRetroError

WHOLE_BYTES = 64 << 20
_SETTLED_SECONDS = 2.0  # a file that changed since may change again within one tick of its clock
_RESTS_PER_WORK = 20.0
Identity = tuple[int, int, int, int, int]


def open_artifact(artifact: Path, *, kind: str, version: int, fix: str, optional: Collection[str] = ()) -> Manifest:
    """The manifest of an artifact, its files verified."""
    manifest = read_manifest(artifact, kind=kind, version=version)
    require_recorded(artifact, manifest, fix=fix, optional=optional)
    return manifest


def require_recorded(
    artifact: Path,
    manifest: Manifest,
    *,
    fix: str,
    read_in_parts: Collection[str] = (),
    optional: Collection[str] = (),
) -> None:
    """Refuse an artifact whose files are not those of its manifest; of those `read_in_parts` the size is checked."""
    for name, record in manifest.files.items():
        path = file_of(artifact, name)
        if name in optional and not path.exists():
            continue
        identity = _require_size(path, record, fix)
        if record.bytes < WHOLE_BYTES and name not in read_in_parts:
            _require_content(path, record, identity, fix)


def require_whole(artifact: Path, manifest: Manifest, name: str, *, fix: str) -> Identity:
    """Verify one file to its last byte, however large; returns which bytes on the disk these were."""
    path = file_of(artifact, name)
    if name not in manifest.files:
        raise DamagedArtifact(f"{path} is not in the manifest of {artifact}", fix=fix)
    identity = _require_size(path, manifest.files[name], fix)
    _require_content(path, manifest.files[name], identity, fix)
    return identity


def unread(manifest: Manifest) -> dict[str, FileRecord]:
    """The files that are too large to be verified when they are opened."""
    return {name: record for name, record in manifest.files.items() if record.bytes >= WHOLE_BYTES}


def file_of(artifact: Path, name: str) -> Path:
    """Where a file that a manifest records lies."""
    return artifact / name if artifact.is_dir() else artifact.with_name(name)


def identity_of(path: Path) -> Identity:
    """Another value once a file was replaced or written to."""
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _require_size(path: Path, record: FileRecord, fix: str) -> Identity:
    try:
        identity = identity_of(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedArtifact(f"{path} is missing", fix=fix) from None
    if identity[2] != record.bytes:
        raise DamagedArtifact(
            f"{path} is cut or replaced", got=f"{identity[2]} bytes", expected=f"{record.bytes} bytes", fix=fix
        )
    return identity


def _require_content(path: Path, record: FileRecord, identity: Identity, fix: str) -> None:
    settled = time.time_ns() - max(identity[3:]) > _SETTLED_SECONDS * 1e9
    if not (_unchanged_before(path, record, identity) if settled else unchanged(path, record)):
        raise DamagedArtifact(f"{path} has changed since it was written: its checksum is wrong", fix=fix)


@lru_cache(maxsize=1024)
def _unchanged_before(path: Path, record: FileRecord, identity: Identity) -> bool:
    """Many parts of a program open one artifact; it is read once."""
    return unchanged(path, record)


def whole_file_check(artifact: Path, manifest: Manifest, name: str, fix: str) -> Callable[[], object]:
    """A check of one file that has no checksums of its blocks, for a `Verification`."""
    return lambda: require_whole(artifact, manifest, name, fix=fix)


class Verification:
    """Runs checks beside the work that reads the same files, and keeps the first damage for whoever asks.

    A check is a call that raises. The thread rests twenty times as long as it works.
    """

    def __init__(self, checks: Iterator[Callable[[], object]]) -> None:
        self._checks = checks
        self._found: MegatronRetroError | None = None
        self._hurry, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="verification", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        try:
            for check in self._checks:
                if self._stopped:
                    return
                began = time.thread_time()
                check()
                self._hurry.wait((time.thread_time() - began) * _RESTS_PER_WORK)
        except MegatronRetroError as error:
            self._found = error

    def require_sound(self) -> None:
        """Raise the damage that was found so far."""
        if self._found is not None:
            raise self._found

    def finish(self) -> None:
        """Wait for the checks that are left, which rest no more; raise what was found."""
        self._hurry.set()
        self._thread.join()
        self.require_sound()

    def close(self) -> None:
        """Leave the checks that are left."""
        self._stopped = True
        self._hurry.set()
        self._thread.join()
