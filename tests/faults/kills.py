"""Kill a stage again and again at moments chosen by a seed, let it finish, and compare what it wrote, byte for byte.

A chain of kills is a pure function of (seed, stage, number of the chain), up to the moments at which the machine runs.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_retro.cli.main import main
from megatron_retro.testing.processes import wait

_LENGTHS = (1, 2, 3, 5, 8)  # kills before a chain may end
_ONE_PROCESS = 0.3  # of the kills hit the first process of the stage alone, the others its whole group
_LONGER = 1.2  # times the last whole run, at most, until a kill
_SECONDS = 120.0


@dataclass(frozen=True)
class Stage:
    """A command that a kill may stop anywhere; `ready` is the folder in which it starts."""

    name: str
    ready: Path
    words: Callable[[Path], list[str]]
    result: Callable[[Path], bytes]
    once: str = ""  # what a finished run leaves and a second one refuses to write over

    def digest(self, folder: Path) -> str:
        """What the stage wrote, in short."""
        return hashlib.sha256(self.result(folder)).hexdigest()


@dataclass
class Chain:
    """What one chain of kills came to."""

    stage: str
    number: int
    kills: int = 0
    faults: list[str] = field(default_factory=list)


def start(words: list[str], log: Path) -> int:
    """The command in a forked process that leads a group of its own; what it says goes to a file."""
    child = os.fork()
    if child:
        with suppress(OSError):
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(said, stream)
        code = main(words)
    finally:
        os._exit(code)


@dataclass(frozen=True)
class Killer:
    """Chains of kills of one stage."""

    stage: Stage
    seed: int
    room: Path
    seconds: list[float] = field(default_factory=list)  # of whole runs that nobody killed

    def chains(self, numbers: Iterator[int]) -> Iterator[Chain]:
        """What the chains of these numbers come to, each in a fresh copy of the folder."""
        wanted, names = self._undisturbed
        for number in numbers:
            with self._folder() as name:
                yield self._chain(number, self._copy(name), wanted, names)

    @cached_property
    def _undisturbed(self) -> tuple[str, set[str]]:
        """What a run that nobody kills writes, and the names."""
        with self._folder() as name:
            folder = self._copy(name)
            began = time.monotonic()
            code = self._run(folder, None)
            assert code == 0 and self.stage.result(folder), (folder / "log").read_text()
            self.seconds.append(time.monotonic() - began)
            return self.stage.digest(folder), _names(folder)

    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(dir=self.room, ignore_cleanup_errors=True)

    def _copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.stage.ready, name, dirs_exist_ok=True))

    def _run(self, folder: Path, moment: float | None, alone: bool = False) -> int | None:
        """The exit code; None for a run that was killed."""
        child = start(self.stage.words(folder), folder / "log")
        code = wait(child, _SECONDS if moment is None else moment)
        if code is None:
            (os.kill if alone else os.killpg)(child, signal.SIGKILL)
            code = wait(child)
            if moment is None:
                raise AssertionError(f"{self.stage.name} hangs: {(folder / 'log').read_text()[-2000:]}")
            return None if code == -signal.SIGKILL else code
        return code

    def _chain(self, number: int, folder: Path, wanted: str, names: set[str]) -> Chain:
        dice = random.Random(f"{self.seed} {self.stage.name} {number}")
        chain, code = Chain(self.stage.name, number), None
        for _ in range(dice.choice(_LENGTHS)):
            began = time.monotonic()
            code = self._run(folder, dice.uniform(0.0, _LONGER * self.seconds[-1]), dice.random() < _ONE_PROCESS)
            if code is not None:
                if not chain.kills:
                    self.seconds.append(time.monotonic() - began)  # the machine is busier now, or less busy
                break
            chain.kills += 1
            if self.stage.once and (folder / self.stage.once).exists() and _names(folder) == names:
                code = 0
                break
        if code is None:
            code = self._run(folder, None)
        said = (folder / "log").read_text(encoding="utf-8")
        if code != 0:
            chain.faults.append(f"exit code {code}: {said[-1000:]}")
        elif self.stage.digest(folder) != wanted:
            chain.faults.append("other bytes")
        elif "Traceback" in said:
            chain.faults.append(f"traceback: {said[-1000:]}")
        found = _names(folder)
        chain.faults += [f"{name} was left" for name in sorted(found - names)]
        chain.faults += [f"{name} is missing" for name in sorted(names - found)]
        return chain


def _names(folder: Path) -> set[str]:
    """What lies below a folder, but claims of workers and logs, which are numbered by the run."""
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    return {str(path) for path in paths if not {"claims", "logs"} & set(path.parts)}
