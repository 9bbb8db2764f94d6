"""Damage a file, let a consumer read it in a forked process, and say what happened: named, without effect, or a fault.

Fault n is a pure function of (seed, n), so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_retro.errors import MegatronRetroError

ROOT = Path(__file__).parents[2]
KINDS = ("flip", "truncate", "swap", "delete", "zero page", "append")
NAMED, WITHOUT_EFFECT, SILENT, TRACEBACK, CRASH = "named", "without effect", "silent", "traceback", "crash"
FAULTS = (SILENT, TRACEBACK, CRASH)
_SECONDS = 120
_PAGE = 4096


@dataclass(frozen=True)
class Consumer:
    """What reads files of a folder and gives back what it read; `everything` is what it must notice, read or not."""

    name: str
    read: Callable[[Path], bytes]
    patterns: tuple[str, ...]
    everything: bool = False

    def files(self, folder: Path) -> list[Path]:
        """The files that it opens."""
        found = {path for pattern in self.patterns for path in folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if not path.name.endswith((".claim", ".lock")))


@dataclass(frozen=True)
class Outcome:
    """What one fault led to."""

    number: int
    consumer: str
    file: str
    kind: str
    result: str
    told: str


def damaged(content: bytes, kind: str, dice: random.Random) -> bytes | None:
    """The content after one fault; None where the file is to be deleted."""
    size = len(content)
    if kind == "delete":
        return None
    if kind == "append":
        return content + dice.randbytes(dice.choice((1, 2, 8, 64, _PAGE)))
    if kind == "truncate" or size == 0:
        return content[: dice.randrange(size)] if size else b"\0"
    changed = bytearray(content)
    if kind == "flip":
        changed[dice.randrange(size)] ^= 1 << dice.randrange(8)
    elif kind == "zero page":
        start = dice.randrange(0, size, _PAGE)
        changed[start : start + _PAGE] = bytes(len(changed[start : start + _PAGE]))
    else:
        length = min(dice.choice((1, 2, 4, 8, 64, 512)), max(1, size // 2))
        first, second = sorted(dice.randrange(size - length + 1) for _ in range(2))
        changed[first : first + length] = content[second : second + length]
        changed[second : second + length] = content[first : first + length]
    return bytes(changed)


def outcome_of(read: Callable[[], bytes]) -> tuple[str, str]:
    """What reading in a child gives: ("read", digest), (NAMED, message), (TRACEBACK, error) or (CRASH, signal)."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(_SECONDS)
            os.close(receiver)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
            try:
                told = ["read", hashlib.sha256(read()).hexdigest()]
            except MegatronRetroError as error:
                told = [NAMED, str(error)]
            except BaseException as error:
                told = [TRACEBACK, f"{type(error).__name__}: {error}"]
            os.write(sender, json.dumps([told[0], told[1][:600]]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(sender)
    with os.fdopen(receiver, "rb") as stream:
        told_bytes = stream.read()
    _, code = os.waitpid(child, 0)
    if os.WIFSIGNALED(code) or not told_bytes:
        return CRASH, f"signal {os.WTERMSIG(code)}" if os.WIFSIGNALED(code) else f"exit {os.WEXITSTATUS(code)}"
    result, told = json.loads(told_bytes)
    return result, told


@dataclass(frozen=True)
class Injector:
    """Faults over all files of all consumers, one consumer after another."""

    folder: Path
    consumers: Sequence[Consumer]
    seed: int

    def outcomes(self, numbers: Iterator[int] | Sequence[int]) -> Iterator[Outcome]:
        """What the faults of these numbers lead to; the folder is as before after each."""
        sound = {}
        for consumer in self.consumers:
            result, sound[consumer.name] = outcome_of(lambda consumer=consumer: consumer.read(self.folder))
            assert result == "read", (consumer.name, sound[consumer.name])
        for number in numbers:
            yield self._outcome(number, sound)

    def _outcome(self, number: int, sound: dict[str, str]) -> Outcome:
        dice = random.Random(f"{self.seed} {number}")
        consumer = self.consumers[number % len(self.consumers)]
        path = dice.choice(consumer.files(self.folder))
        kind = KINDS[number // len(self.consumers) % len(KINDS)]
        content = path.read_bytes()
        after = damaged(content, kind, dice)
        try:
            path.unlink() if after is None else path.write_bytes(after)
            result, told = outcome_of(lambda: consumer.read(self.folder))
        finally:
            path.write_bytes(content)
        if result == "read":
            unseen = told == sound[consumer.name] and not (consumer.everything and after != content)
            result = WITHOUT_EFFECT if unseen else SILENT
        return Outcome(number, consumer.name, str(path.relative_to(self.folder)), kind, result, told)


def table(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """Counts by consumer, with those of all."""
    rows: list[dict[str, object]] = []
    for name in [*dict.fromkeys(sorted(outcome.consumer for outcome in outcomes)), "all"]:
        chosen = [outcome for outcome in outcomes if name in ("all", outcome.consumer)]
        counts = Counter(outcome.result for outcome in chosen)
        results = (NAMED, WITHOUT_EFFECT, *FAULTS)
        rows.append({"consumer": name, "faults": len(chosen), **{result: counts[result] for result in results}})
    return rows


def commit() -> str:
    """What is checked out."""
    return subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def kept_lines(path: Path | None) -> list[str]:
    """What a run of this commit that was stopped wrote down; that of another commit is dropped."""
    if path is None:
        return []
    mark = path.with_suffix(".commit")
    if not mark.exists() or mark.read_text() != commit():
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        mark.write_text(commit())
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def seconds_since(start: float) -> float:
    """Elapsed time, rounded for a record."""
    return round(time.monotonic() - start, 1)
