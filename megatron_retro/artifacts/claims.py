"""Blocks of work shared by any number of workers, without a coordinator.

A worker claims a block by creating its claim file exclusively and renews the claim while it works. A worker that
dies stops renewing, so its lease runs out and another takes the block. The lease is measured by watching the claim, for
clocks of nodes and file servers differ. The block is finished when its output has its
final name: outputs are deterministic and renamed into place, so even two workers on one block do no harm.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_retro.artifacts.files import make_folder, named_disk_errors, this_host

DEFAULT_LEASE_SECONDS = 60.0
_LARGEST_SKEW = 30.0  # seconds between clocks; a claim that is older still need not be watched


@dataclass(frozen=True)
class BlockClaims:
    """Claims on the named blocks of one directory. `is_done(block)` says that its output is in place."""

    directory: Path
    blocks: Sequence[str]
    is_done: Callable[[str], bool]
    lease_seconds: float = DEFAULT_LEASE_SECONDS
    wait: bool = True
    _watched: dict[Path, tuple[str, int, float]] = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[str]:
        """Yield blocks to do, each under a claim held while the caller works on it; ends when all are done.

        Blocks that others hold are waited for, and taken over if their worker dies; without `wait` they are left.
        """
        make_folder(self.directory)
        while True:
            waiting = False
            for block in self.blocks:
                if self.is_done(block):
                    self._drop_expired(self._path(block))  # of a worker that died between its output and its release
                    continue
                with self._claim(block) as held:
                    if held and not self.is_done(block):
                        yield block
                    elif not held:
                        waiting = True
            if not waiting or not self.wait:
                return
            time.sleep(min(1.0, self.lease_seconds / 10))

    def _path(self, block: str) -> Path:
        return self.directory / f"{block}.claim"

    @contextmanager
    def _claim(self, block: str) -> Iterator[bool]:
        path = self._path(block)
        token = f"{this_host()} {os.getpid()} {uuid.uuid4().hex}"
        self._drop_expired(path)
        if not _create_exclusively(path, token):
            yield False
            return
        stop = threading.Event()
        renewer = threading.Thread(target=self._renew, args=(path, stop), daemon=True)
        renewer.start()
        try:
            yield True
        finally:
            stop.set()
            renewer.join()
            if _content(path) == token:
                path.unlink(missing_ok=True)

    def _renew(self, path: Path, stop: threading.Event) -> None:
        while not stop.wait(self.lease_seconds / 4):
            try:
                os.utime(path)
            except FileNotFoundError:
                return

    def _drop_expired(self, path: Path) -> None:
        """Remove a claim that its worker no longer renews; the rename lets one remover win."""
        content = _content(path)
        if content is None or not self._expired(path, content):
            return
        stale = path.with_name(f"{path.name}.stale-{uuid.uuid4().hex[:8]}")
        try:
            os.rename(path, stale)
        except FileNotFoundError:
            return
        if _content(stale) != content:
            _restore(stale, path)
        stale.unlink(missing_ok=True)

    def _expired(self, path: Path, content: str) -> bool:
        host, process = [*content.split(), "", ""][:2]
        if host == this_host() and process.isdigit() and not Path(f"/proc/{process}").exists():
            return True
        try:
            renewed = path.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        known = self._watched.get(path)
        if known is None or known[:2] != (content, renewed):
            known = self._watched[path] = (content, renewed, time.monotonic())
        if time.time() - renewed / 1e9 > self.lease_seconds + _LARGEST_SKEW:
            return True
        return time.monotonic() - known[2] > self.lease_seconds


def _create_exclusively(path: Path, content: str) -> bool:
    """Create `path` unless it exists. A worker killed before the content is in holds it until the lease ends."""
    with named_disk_errors(path):
        try:
            claim = path.open("x")
        except FileExistsError:
            return False
        try:
            with claim:
                claim.write(content)
        except BaseException:
            path.unlink(missing_ok=True)  # on a full disk an empty claim would hold the block from whoever resumes
            raise
    return True


def _restore(stale: Path, path: Path) -> None:
    """Put back a fresh claim that was renamed by mistake, unless a newer one stands there."""
    try:
        os.link(stale, path)
    except FileExistsError:
        return


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
