"""Stands for `python -m megatron_retro.cli.main`: ranks that save, refuse, fail or wait as a test says.

ON_STOP, AT_ONCE   per rank, "CODE after SECONDS" with commas between: on a signal, or without one
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_retro.runtime.endings import end_on_signals, write_ending
from megatron_retro.runtime.signals import StopRequests


def leave(what: str) -> None:
    words = what.split(",")
    code, seconds = words[int(os.environ["SLURM_PROCID"]) % len(words)].split(" after ")
    time.sleep(float(seconds))
    if code == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    write_ending(int(code), f"as told: {code}")
    sys.exit(int(code))


def work(verb: str, restarts: int) -> None:
    if verb == "reach":
        time.sleep(float(os.environ.get("REACH_SECONDS", "0")))
        return
    time.sleep(float(os.environ.get("IMPORT_SECONDS", "0")))
    end_on_signals()
    with StopRequests().listening() as stops:
        if "NO_CHECKPOINTS" not in os.environ and int(os.environ["SLURM_PROCID"]) == 0:
            step = Path(sys.argv[sys.argv.index("--save") + 1]) / f"step-{restarts + 1:08}"
            step.mkdir(parents=True, exist_ok=True)
            (step / "manifest.json").touch()
        Path(f"up-{restarts}-{os.environ['SLURM_PROCID']}").touch()
        if "AT_ONCE" in os.environ and restarts < int(os.environ.get("FAILING_STARTS", "99")):
            leave(os.environ["AT_ONCE"])
        if restarts:
            return
        for _ in range(1200):
            if stops.reason() and "ON_STOP" in os.environ:
                leave(os.environ["ON_STOP"])
            time.sleep(0.05)


if __name__ == "__main__":
    work(sys.argv[3], int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    write_ending(0, "")
