"""Blocks of work shared by any number of workers, without a coordinator.

A worker claims a block by creating its claim file exclusively and renews the claim while it works. A worker that
dies stops renewing, so its lease runs out and another takes the block. The lease is measured by the file system's own
clock, which a freshly touched file tells: clocks of nodes and file servers differ. The block is finished when its
output has its final name: outputs are deterministic and renamed into place, so even two workers on one block do no
harm.

Waiting is cheap, so that hundreds may wait: a finished block is never looked at again, whoever has waited long looks
seldom, and those who wait share the watch over the claims of those who work.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_retro.artifacts.files import fresh_name, make_folder, named_disk_errors, this_host

_LEASE_SECONDS = 60.0
_CLAIM, _WAITER = ".claim", "waiter"


@dataclass(frozen=True)
class BlockClaims:
    """Claims on the named blocks of one directory. `is_done(block)` says that its output is in place."""

    directory: Path
    blocks: Sequence[str]
    is_done: Callable[[str], bool]
    lease_seconds: float = _LEASE_SECONDS
    wait: bool = True

    def __iter__(self) -> Iterator[str]:
        """Yield blocks to do, each under a claim held while the caller works on it; ends when all are done.

        Blocks that others hold are waited for, and taken over if their worker dies; without `wait` they are left.
        """
        make_folder(self.directory)
        with _Waiter(self.directory, self.lease_seconds) as waiter:
            candidates, held = list(self.blocks), list[str]()
            while True:
                for block in candidates:
                    if self.is_done(block):
                        waiter.drop_expired(self._path(block))  # of a worker that died between output and release
                        continue
                    with self._claim(block, waiter) as mine:
                        if mine and not self.is_done(block):
                            yield block
                        elif not mine:
                            held.append(block)
                if not held or not self.wait:
                    return
                claimed = waiter.watch()
                candidates = [block for block in held if self._path(block).name not in claimed]
                held = [block for block in held if self._path(block).name in claimed]

    def _path(self, block: str) -> Path:
        return self.directory / f"{block}{_CLAIM}"

    @contextmanager
    def _claim(self, block: str, waiter: _Waiter) -> Iterator[bool]:
        path = self._path(block)
        token = f"{this_host()} {os.getpid()} {uuid.uuid4().hex}"
        waiter.drop_expired(path)
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
            except OSError:  # of the server for now: without renewing, a living worker would lose its block
                continue


@dataclass
class _Waiter:
    """One worker that looks after the claims of others. Its file tells the time, and all of them how many wait."""

    directory: Path
    lease_seconds: float
    file: Path | None = None
    ahead: float = 0.0  # of the file system's clock over this process's
    looked: float = -math.inf
    waited: float = 0.0

    def __enter__(self) -> _Waiter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def watch(self) -> set[str]:
        """Wait a tenth of what was waited before, drop what expired; returns the claims that stand."""
        pause = min(1.5 * self.lease_seconds, 0.1 + self.waited / 10) * random.uniform(0.75, 1.25)
        time.sleep(pause)
        self.waited += pause
        try:
            self._now()
            names = os.listdir(self.directory)
        except FileNotFoundError:  # who did the last block may remove the directory
            make_folder(self.directory)  # or somebody else did, and there is work left
            return set()
        claims = sorted(name for name in names if name.endswith(_CLAIM))
        waiters = max(sum(name.startswith(_WAITER) for name in names), 1)
        share = int(len(claims) / waiters + random.random())
        for name in random.sample(claims, min(share, len(claims))):
            self.drop_expired(self.directory / name)
        return set(claims)

    def drop_expired(self, path: Path) -> None:
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
            renewed = path.stat().st_mtime  # as the server has it: the content was read just now
            return self._now() - renewed > self.lease_seconds
        except FileNotFoundError:
            return False

    def _now(self) -> float:
        """The file system's clock."""
        if time.monotonic() - self.looked > self.lease_seconds / 8:
            if self.file is None:
                self.file = fresh_name(self.directory / _WAITER)
            with named_disk_errors(self.file):
                if not self.file.exists():
                    self.file.touch()
                os.utime(self.file)
            self.looked = time.monotonic()
            self.ahead = self.file.stat().st_mtime - self.looked
        return self.ahead + time.monotonic()


def _create_exclusively(path: Path, content: str) -> bool:
    """Create `path` unless it exists, or its directory is gone, which whoever waits makes again.

    A worker killed before the content is in holds it until the lease ends.
    """
    with named_disk_errors(path):
        try:
            claim = path.open("x")
        except (FileExistsError, FileNotFoundError):
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
    with suppress(FileExistsError, FileNotFoundError):
        os.link(stale, path)


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
