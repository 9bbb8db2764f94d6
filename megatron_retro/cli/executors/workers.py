"""One worker as an executor starts it: the same command, told to do the work itself, with a log and an ending."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_retro.config.data import LOCAL
from megatron_retro.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from megatron_retro.runtime.endings import FOLDER_VARIABLE, RANK_VARIABLE

PROGRAM = (sys.executable, "-m", "megatron_retro.cli.main")
AGAIN = (EXIT_REQUEUE, EXIT_INTERRUPTED)


@dataclass(frozen=True)
class Workers:
    """`count` workers of one command; each leaves `worker-N.log` and `rank-N.json`, its code and why, in `folder`."""

    arguments: tuple[str, ...]
    count: int
    folder: Path

    @classmethod
    def of(cls, arguments: Sequence[str], count: int, folder: Path) -> Workers:
        """Those of a command line; what is said last of a flag counts."""
        return cls((*arguments, "--executor", LOCAL), count, folder.absolute())

    @property
    def verb(self) -> str:
        """What they do."""
        return self.arguments[0]

    @property
    def name(self) -> str:
        """The same for the same work, wherever it is asked for."""
        place = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:8]
        return f"{self.verb}-{place}"

    @property
    def command(self) -> tuple[str, ...]:
        """What starts one of them, if its environment says which."""
        return (*PROGRAM, *self.arguments)

    def log(self, number: int | str) -> Path:
        """What a worker says."""
        return self.folder / f"worker-{number}.log"

    def environment(self, number: int | str) -> dict[str, str]:
        """What tells a worker where to leave its ending."""
        return {FOLDER_VARIABLE: str(self.folder), RANK_VARIABLE: str(number)}

    def endings(self) -> list[tuple[int, str, Path]]:
        """The code of each worker that has ended, why, and its log."""
        found = []
        for path in sorted(self.folder.glob("rank-*.json")):
            facts = json.loads(path.read_text(encoding="utf-8"))
            found.append((int(facts["code"]), str(facts["why"]), self.log(int(facts["rank"]))))
        return found

    def forget_endings(self) -> None:
        """Before a new start."""
        for path in self.folder.glob("rank-*.json"):
            path.unlink(missing_ok=True)
