"""Injects events into the tiny chain under a real SLURM, and says what became of each.

    python tests/examples/slurm/inject_events.py ROOM [--chains N] [--seed S] [--table]

A chain runs undisturbed first; then each chain meets one event in each of its stages, at a random moment. What is
asked: every job ends finished, or with one clear message; and the weights are bit for bit those of the undisturbed
chain. The file `ROOM/events.json` is added to: the same command goes on where it stopped. `--table` prints it for
docs/operations.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_retro.runtime.console import say
from megatron_retro.testing.slurm import Cluster

ROOT = Path(__file__).resolve().parents[3]
TRAINING = {"pretrain": "gpt-tiny", "retrofit": "retro-tiny", "instruct": "instruct-tiny"}
ARRAYS = ("corpus", "index")
STAGES = (*ARRAYS, *TRAINING)
EVENTS = ("requeue", "USR1", "TERM", "USR1 to the batch script", "kill", "pause", "node death", "double start")
ARRAY_EVENTS = ("requeue", "USR1", "TERM", "USR1 to the batch script", "kill", "pause", "node death", "lost worker")
LONGEST_SECONDS = 400.0


@dataclass
class Outcome:
    """What an event did."""

    chain: int
    stage: str
    event: str
    after: float
    state: str
    restarts: int
    hit: bool
    message: str
    clear: bool
    equal: bool = True


class Chain:
    """One run of the stages, in a directory of its own."""

    def __init__(self, cluster: Cluster, room: Path) -> None:
        self.cluster, self.room = cluster, room
        self.variables = {
            **{name: str(room / name.lower()) for name in ("DATA", "RUNS", "LOGS")},
            "WORKERS": "2",
            "HEALTH_CHECK": "off",
            "OMP_NUM_THREADS": "1",
            "LEAVE_SECONDS": "30",
        }

    def submit(self, stage: str, **more: str) -> int:
        script = str(ROOT / "examples/slurm/submit.sh")
        options = (f"--chdir={self.room}", f"--output={self.room}/{stage}-%j.log")
        return int(self.cluster.run(script, stage, "tiny", *options, **{**self.variables, **more}))

    def finish(self, stage: str) -> None:
        if stage in ARRAYS:
            facts = self.cluster.wait(self.submit(stage, FINISH="on"), LONGEST_SECONDS)
            if facts["JobState"] != "COMPLETED":
                raise RuntimeError(f"the finishing job of {stage} in {self.room} ended {facts['JobState']}")

    def weights(self) -> dict[str, str]:
        """A checksum of the newest tensors of each run."""
        found = {}
        for run in TRAINING.values():
            newest = sorted((self.room / "runs" / run).glob("step-*"))[-1]
            content = b"".join(path.read_bytes() for path in sorted(newest.glob("*.safetensors")))
            found[run] = hashlib.sha256(content).hexdigest()
        return found

    def last_words(self, stage: str, job: int) -> str:
        logs = sorted(self.room.glob(f"{stage}-{job}*.log")) or sorted(self.room.glob(f"{stage}-*.log"))
        lines = "\n".join(log.read_text(errors="replace") for log in logs).splitlines()
        told = [line for line in lines if " logs in " in line]
        return told[-1].split(": ", 1)[-1] if told else (lines[-1] if lines else "")


def processes_of(job: int) -> list[int]:
    """Python processes of the ranks of a job."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (place / "environ").read_bytes().split(b"\0")
            words = (place / "cmdline").read_bytes().split(b"\0")
            ours = f"SLURM_JOB_ID={job}".encode() in environment or f"SLURM_ARRAY_JOB_ID={job}".encode() in environment
            if ours and any(word.startswith(b"SLURM_PROCID=") for word in environment) and b"-m" in words:
                found.append(int(place.name))
    return sorted(found)


def inject(chain: Chain, stage: str, job: int, event: str, draw: random.Random) -> bool:
    """Make it happen; whether there was something to hit."""
    cluster, ranks = chain.cluster, processes_of(job)
    if cluster.states(job) <= {"COMPLETED"}:
        return False
    with suppress(AssertionError):  # the job may end this moment
        if event == "requeue":
            cluster.run("scontrol", "requeue", str(job))
        elif event in ("USR1", "TERM"):
            cluster.run("scancel", f"--signal={event}", str(job))
        elif event == "USR1 to the batch script":
            cluster.run("scancel", "--batch", "--signal=USR1", str(job))
        elif event == "lost worker":
            cluster.run("scancel", f"{job}_{draw.randrange(2)}")
        elif event == "node death":
            node = cluster.run("scontrol", "show", "hostnames", cluster.facts(job)["NodeList"]).split()[-1]
            cluster.kill_node(node)
            time.sleep(5)
            cluster.start_node(node)
        elif event == "double start":
            second = chain.submit(stage)
            facts = cluster.wait(second, LONGEST_SECONDS)
            said = chain.last_words(stage, second)
            return facts["JobState"] == "COMPLETED" or (facts["ExitCode"] == "2:0" and "belongs to a run" in said)
        elif ranks:
            number = draw.choice(ranks)
            os.kill(number, signal.SIGKILL if event == "kill" else signal.SIGSTOP)
            if event == "pause":
                time.sleep(3)
                os.kill(number, signal.SIGCONT)
        else:
            return False
        return True
    return False


def disturbed(cluster: Cluster, room: Path, number: int, seed: int, usual: dict[str, float]) -> list[Outcome]:
    """A chain with an event in each stage; what became of them."""
    draw = random.Random(f"{seed} {number}")
    chain = Chain(cluster, room / f"chain-{number}")
    shutil.rmtree(chain.room, ignore_errors=True)
    chain.room.mkdir()
    for name in ("text", "instructions"):
        shutil.copytree(room / "whole/data" / name, chain.room / "data" / name)
    found = []
    for stage in STAGES:
        event = draw.choice(ARRAY_EVENTS if stage in ARRAYS else EVENTS)
        after = draw.uniform(0.1, 1.0) * usual[stage]
        job = chain.submit(stage)
        time.sleep(after)
        hit = inject(chain, stage, job, event, draw)
        facts = cluster.wait(job, LONGEST_SECONDS)
        state, words = facts["JobState"], chain.last_words(stage, job)
        clear = state == "COMPLETED" or " failed with code " in words or stage in ARRAYS
        found.append(
            Outcome(number, stage, event, round(after, 1), state, int(facts["Restarts"]), hit, words[-200:], clear)
        )
        say(f"{time.strftime('%H:%M:%S')} {found[-1]}")
        if state != "COMPLETED" and stage in TRAINING:
            raise RuntimeError(f"by hand: {found[-1]}")
        chain.finish(stage)
    equal = chain.weights() == json.loads((room / "whole.json").read_text())["weights"]
    for outcome in found:
        outcome.equal = equal
    if equal and all(outcome.clear for outcome in found):
        shutil.rmtree(chain.room)
    return found


def undisturbed(cluster: Cluster, room: Path) -> dict[str, float]:
    """The chain to compare with; seconds of each stage."""
    path = room / "whole.json"
    if not path.exists():
        chain = Chain(cluster, room / "whole")
        shutil.rmtree(chain.room, ignore_errors=True)
        chain.room.mkdir(parents=True)
        submit_all = str(ROOT / "examples/slurm/submit_all.sh")
        # makes the data; the stages are submitted one by one below
        cluster.run(submit_all, "tiny", "--hold", f"--chdir={chain.room}", **{**chain.variables, "STAGES": "report"})
        seconds = {}
        for stage in STAGES:
            began = time.monotonic()
            facts = cluster.wait(chain.submit(stage), LONGEST_SECONDS)
            seconds[stage] = time.monotonic() - began
            if facts["JobState"] != "COMPLETED":
                raise RuntimeError(f"{stage} of the undisturbed chain ended {facts['JobState']}")
        path.write_text(json.dumps({"seconds": seconds, "weights": chain.weights()}))
    return dict(json.loads(path.read_text())["seconds"])


def table(outcomes: list[dict[str, object]]) -> str:
    """Events by kind, as it stands in docs/operations.md."""
    hits = [outcome for outcome in outcomes if outcome["hit"]]
    lines = ["| event | injected | finished | started again | by hand | weights equal |", "|---|---|---|---|---|---|"]
    for event in sorted({str(outcome["event"]) for outcome in hits}):
        of_event = [outcome for outcome in hits if outcome["event"] == event]
        counts = Counter(str(outcome["state"]) for outcome in of_event)
        finished = counts["COMPLETED"]
        again = sum(int(str(outcome["restarts"])) for outcome in of_event)
        hand = sum(not outcome["clear"] for outcome in of_event)
        equal = sum(bool(outcome["equal"]) for outcome in of_event)
        lines.append(f"| {event} | {len(of_event)} | {finished} | {again} | {hand} | {equal} of {len(of_event)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", type=Path)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    room = asked.room.resolve()
    path = room / "events.json"
    known = json.loads(path.read_text()) if path.exists() else []
    if asked.table:
        print(table(known))
        return
    room.mkdir(parents=True, exist_ok=True)
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cluster = Cluster(Path(__file__).with_name("cluster.sh"), room / "slurm", {**os.environ, "PATH": programs})
    cluster.start(nodes=3)
    try:
        usual = undisturbed(cluster, room)
        for number in range(max([int(outcome["chain"]) + 1 for outcome in known], default=0), asked.chains):
            known += [asdict(outcome) for outcome in disturbed(cluster, room, number, asked.seed, usual)]
            path.write_text(json.dumps(known, indent=1))
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
