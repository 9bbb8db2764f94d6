"""What a rank and the launcher around it tell each other, through a folder that the launcher names in the environment.

The wrapper of the launcher starts a rank with the signals ignored, and keeps one that comes before a handler stands in
the file `stop`. The rank leaves `rank-N.json`: the code that it ends with, and why. The code of srun tells neither: it
is that of any rank, or of the signal that ended the others.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from megatron_retro.errors import Requeue
from megatron_retro.runtime.strict_json import json_text

FOLDER_VARIABLE = "MEGATRON_RETRO_ENDINGS"
RANK_VARIABLE = "MEGATRON_RETRO_ENDING_RANK"
_STOP = "stop"


def early_stop() -> int | None:
    """The signal that came to this job before a handler stood; None where no launcher kept one."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return None
    with suppress(OSError, ValueError, LookupError):  # it may be empty: the disk was full
        return signal.Signals["SIG" + (Path(folder) / _STOP).read_text(encoding="utf-8").split()[0]]
    return None


def end_on_signals() -> None:
    """Take back the signals that a launcher's wrapper ignores, so that they end what has not asked for them.

    Nothing that is written here is lost by that. Raises `Requeue` for a signal that came before.
    """
    if FOLDER_VARIABLE not in os.environ:
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    early = early_stop()
    if early is not None:
        raise Requeue(f"{signal.Signals(early).name} arrived before the start", fix="run the same command again")


def write_ending(code: int, why: str) -> None:
    """Tell the launcher, if there is one, with which code this rank ends and why."""
    folder, rank = os.environ.get(FOLDER_VARIABLE), os.environ.get(RANK_VARIABLE)
    if folder is None or rank is None:
        return
    facts = {
        "rank": int(rank),
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "code": code,
        "time": round(time.time(), 3),
        "why": "; ".join(line.strip() for line in why.splitlines()),
    }
    path = Path(folder) / f"rank-{rank}.json"
    with suppress(OSError):  # a full disk may be why
        partial = path.with_suffix(".partial")
        partial.write_text(json_text(facts) + "\n", encoding="utf-8")
        os.replace(partial, path)
