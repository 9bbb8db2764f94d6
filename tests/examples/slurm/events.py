"""What can happen to a job of the tiny chain, and how each of it is made to happen."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.examples.slurm.chain import Chain

TRAINING = {"pretrain": "gpt-tiny", "retrofit": "retro-tiny", "instruct": "instruct-tiny"}
ARRAYS = ("corpus", "index")
STAGES = (*ARRAYS, *TRAINING, "evaluate", "report")
COMMON = ("requeue", "USR1", "TERM", "USR1 to the batch script", "kill", "pause", "node death", "clock")
EVENTS = {
    **dict.fromkeys(STAGES, COMMON),
    **dict.fromkeys(ARRAYS, (*COMMON, "lost worker", "full disk")),
    **dict.fromkeys(TRAINING, (*COMMON, "double start", "full disk", "hang", "time limit")),
}
FAILURES = ("kill", "hang", "node death")  # two in a job without a checkpoint between them are for a person
STARTS_AGAIN = ("requeue", "USR1", "TERM", "USR1 to the batch script", "kill", "node death", "hang", "time limit")


def draw_events(stage: str, count: int, draw: random.Random, preferred: Sequence[str] = ()) -> list[str]:
    """What happens to a job of this stage, at most one failure among it; of preferred kinds where the stage has any."""
    found: list[str] = []
    kinds = [event for event in EVENTS[stage] if event in preferred] or EVENTS[stage]
    while len(found) < count:
        event = draw.choice(kinds)
        if event not in FAILURES or not set(found) & set(FAILURES):
            found.append(event)
    return found


def ranks_of(job: int) -> list[int]:
    """Process numbers of the ranks of a job, or of the workers of an array."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (place / "environ").read_bytes().split(b"\0")
            words = (place / "cmdline").read_bytes().split(b"\0")
            ours = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_ARRAY_JOB_ID={job}".encode()} & set(environment)
            is_rank = any(word.startswith(b"MEGATRON_RETRO_ENDING_RANK=") for word in environment)
            if ours and is_rank and Path(os.fsdecode(words[0])).name.startswith("python"):
                found.append(int(place.name))
    return sorted(found)


def happen(chain: Chain, stage: str, job: int, event: str, draw: random.Random) -> bool:
    """Make it happen; whether there was something to hit."""
    if chain.cluster.states(job) <= {"COMPLETED"}:
        return False
    if event in ("kill", "pause", "hang"):
        return _hit_a_rank(job, event, draw)
    with suppress(AssertionError):  # the job may end this moment
        return _hit_the_job(chain, stage, job, event, draw)
    return False


def _hit_a_rank(job: int, event: str, draw: random.Random) -> bool:
    ranks = ranks_of(job)
    if not ranks:
        return False
    rank = draw.choice(ranks)
    with suppress(ProcessLookupError):
        os.kill(rank, signal.SIGKILL if event == "kill" else signal.SIGSTOP)
        if event == "pause":
            time.sleep(3)
            os.kill(rank, signal.SIGCONT)
        return True
    return False


def _hit_the_job(chain: Chain, stage: str, job: int, event: str, draw: random.Random) -> bool:
    cluster = chain.cluster
    if event == "requeue":
        cluster.run("scontrol", "requeue", str(job))
    elif event in ("USR1", "TERM"):
        cluster.run("scancel", f"--signal={event}", str(job))
    elif event == "USR1 to the batch script":
        cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    elif event == "lost worker":
        cluster.run("scancel", f"{job}_{draw.randrange(2)}")
    elif event == "time limit":  # SLURM sends the warning that the job asked for when it looks at limits next
        hours, minutes, _ = cluster.facts(job)["RunTime"].split(":")
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    elif event == "node death":
        node = draw.choice(cluster.run("scontrol", "show", "hostnames", cluster.facts(job)["NodeList"]).split())
        cluster.kill_node(node)
        time.sleep(5)
        cluster.start_node(node)
    elif event == "clock":
        chain.set_clock(draw.uniform(-5.0, 5.0))
    elif event == "full disk":
        return chain.fill_disk()
    elif event == "double start":
        second = chain.submit(stage)
        facts = cluster.wait(second, chain.longest_seconds)
        said = chain.last_words(stage, second)
        return facts["JobState"] == "COMPLETED" or (facts["ExitCode"] == "2:0" and "belongs to a run" in said)
    return True


def compile_clock(folder: Path) -> Path:
    """The library that gives the second rank a clock of its own."""
    library = folder / "clock.so"
    source = str(Path(__file__).with_name("clock.c"))
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), source], check=True)
    return library


def write_clock(file: Path, seconds: float) -> None:
    """That clock's lead; the file is mapped by those who read it, so it is written in place."""
    with file.open("r+b" if file.exists() else "wb") as stream:
        stream.write(struct.pack("q", round(seconds * 1e9)))
