"""Injects events into the tiny chain under a real SLURM, and says what became of each.

    python -m tests.examples.slurm.inject_events ROOM [--first N] [--chains N] [--seed S] [--prefer EVENT...]
                                                 [--results FILE] [--table]

A chain runs undisturbed first; then each chain meets events in each of its stages, one after the other, at random
moments. What is asked: every job ends finished, or with one clear message; and the weights are bit for bit those of the
undisturbed chain. The results are added to after each event: the same command goes on with the first chain that has
not ended. `--table` prints them for docs/operations.md. Events that fill a disk need the right to mount one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from megatron_retro.runtime.console import say
from megatron_retro.testing.slurm import Cluster
from tests.examples.slurm.chain import Chain, clear
from tests.examples.slurm.events import ARRAYS, STAGES, STARTS_AGAIN, TRAINING, compile_clock, draw_events, happen

COUNTS = {"corpus": 1, "index": 2, "evaluate": 1, "report": 1, **dict.fromkeys(TRAINING, 3)}
FINISHED, REFUSED, BY_HAND = "finished", "one message", "by hand"


@dataclass
class Outcome:
    """What an event did. Times are None where it started nothing again; `equal` is None until the chain has ended."""

    chain: int
    stage: str
    event: str
    after: float
    hit: bool
    starts_again: int = 0
    seconds_to_leave: float | None = None
    seconds_to_step: float | None = None
    ending: str = ""
    message: str = ""
    equal: bool | None = None
    commit: str = ""


@dataclass
class Disturbance:
    """One stage of a chain and the events that it meets."""

    chain: Chain
    number: int
    stage: str
    draw: random.Random
    usual: float
    preferred: Sequence[str] = ()
    commit: str = ""

    def run(self) -> list[Outcome]:
        """Submit, disturb, wait; after a refusal the disk is freed, and the stage goes on."""
        events = draw_events(self.stage, COUNTS[self.stage], self.draw, self.preferred)
        found, job = list[Outcome](), self.chain.submit(self.stage)
        for event in events:
            found.append(self._event(job, event))
            if self._has_ended(job):
                if self._end(job, found) != REFUSED:
                    return found
                job = self.chain.submit(self.stage)
        self._end(job, found)
        return found

    def _event(self, job: int, event: str) -> Outcome:
        # of several events each has its part of the job; a job that started again is followed until its first step
        after = self.draw.uniform(0.05, 0.9 if COUNTS[self.stage] == 1 else 0.45) * self.usual
        time.sleep(after)
        before, moment = self._restarts(job), time.time()
        hit = happen(self.chain, self.stage, job, event, self.draw)
        outcome = Outcome(self.number, self.stage, event, round(after, 1), hit, commit=self.commit)
        if hit and event in STARTS_AGAIN:
            self._until_started_again(job, before, moment, outcome)
        if event == "full disk":
            self.chain.cluster.wait(job, self.chain.longest_seconds)
        return outcome

    def _until_started_again(self, job: int, before: int, moment: float, outcome: Outcome) -> None:
        cluster = self.chain.cluster
        cluster.wait_until(
            lambda: self._has_ended(job) or self._restarts(job) > before, self.chain.longest_seconds, "a restart"
        )
        outcome.starts_again = self._restarts(job) - before
        if not outcome.starts_again:
            return
        outcome.seconds_to_leave = round(time.time() - moment, 1)
        outcome.message = self._last_words(job)[-300:]
        if outcome.event == "time limit":
            cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
        cluster.wait_until(
            lambda: self._has_ended(job) or "RUNNING" in cluster.states(job), self.chain.longest_seconds, "a start"
        )
        if self.stage in TRAINING:
            self._time_to_step(job, outcome)

    def _time_to_step(self, job: int, outcome: Outcome) -> None:
        """From SLURM's start of the job to the end of its first step; none if the job ends or starts again before."""
        chain, restarts = self.chain, self._restarts(job)
        start = datetime.fromisoformat(chain.cluster.facts(job)["StartTime"]).timestamp()
        chain.cluster.wait_until(
            lambda: (
                bool(chain.steps_since(self.stage, start)) or self._has_ended(job) or self._restarts(job) > restarts
            ),
            chain.longest_seconds,
            "a step",
        )
        steps = chain.steps_since(self.stage, start)
        outcome.seconds_to_step = round(steps[0] - start, 1) if steps and self._restarts(job) == restarts else None

    def _end(self, job: int, outcomes: list[Outcome]) -> str:
        """How the job ended; of the events that have no ending yet, those that met this end get it."""
        chain = self.chain
        chain.cluster.wait(job, chain.longest_seconds)
        chain.free_disk()
        chain.set_clock(0.0)
        words, states = self._last_words(job), chain.cluster.states(job)
        lost = any(outcome.event == "lost worker" for outcome in outcomes)
        waiting = [outcome for outcome in outcomes if not outcome.ending]
        ending, met = BY_HAND, waiting[-1:] or outcomes[-1:]
        if states <= ({"COMPLETED", "CANCELLED"} if lost else {"COMPLETED"}):
            ending, met = FINISHED, waiting
        elif "failed with code 2" in words and any(outcome.event == "full disk" for outcome in waiting):
            # what came before the full disk was survived, and ends with the stage
            ending, met = REFUSED, [outcome for outcome in waiting if outcome.event == "full disk"]
        for outcome in met:
            outcome.ending, outcome.message = ending, outcome.message or words[-300:]
            if outcome.event == "time limit" and ending == FINISHED and not outcome.starts_again:
                outcome.hit = False  # the job was over before SLURM looked at its limit
        if ending == BY_HAND:
            say(f"by hand: {outcomes} {words}")
            if self.stage not in ARRAYS:
                chain.cluster.wait(chain.submit(self.stage), chain.longest_seconds)
            for outcome in waiting[:-1]:
                outcome.ending, outcome.message = FINISHED, outcome.message or words[-300:]
        return ending

    def _last_words(self, job: int) -> str:
        words, room = self.chain.last_words(self.stage, job), re.escape(str(self.chain.room))
        return re.sub(room + r"/(?:[^\s;]*/)?(?=[^\s;/])", "ROOM/", words)  # a file's name says enough

    def _restarts(self, job: int) -> int:
        return self.chain.cluster.restarts(job)

    def _has_ended(self, job: int) -> bool:
        return self.chain.cluster.has_ended(job)


def disturbed(
    cluster: Cluster,
    room: Path,
    number: int,
    asked: argparse.Namespace,
    usual: dict[str, float],
    save: Callable[[list[Outcome]], None],
) -> None:
    """A chain with events in each stage; what became of them is saved as it happens."""
    draw = random.Random(f"{asked.seed} {number}")
    place, commit = room / f"chain-{number}", commit_of(Path(__file__).parent)
    clear(place)
    chain = Chain(cluster, place, room / "clock.so")
    shutil.copytree(room / "data", chain.disk / "data")
    found: list[Outcome] = []
    for stage in STAGES:
        found += Disturbance(chain, number, stage, draw, usual[stage], asked.prefer, commit).run()
        say(f"{time.strftime('%H:%M:%S')} {[outcome for outcome in found if outcome.stage == stage]}")
        save(found)
        chain.finish(stage)
    equal = chain.weights() == json.loads((room / "whole.json").read_text())["weights"]
    for outcome in found:
        outcome.equal = equal
    save(found)
    chain.close(keep=not equal or any(outcome.ending == BY_HAND for outcome in found))


def commit_of(folder: Path) -> str:
    """What the chain was made from; nothing where there is no git."""
    words = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def undisturbed(cluster: Cluster, room: Path) -> dict[str, float]:
    """The chain to compare with; seconds of each stage."""
    path = room / "whole.json"
    if not path.exists():
        clear(room / "whole")
        chain = Chain(cluster, room / "whole", room / "clock.so")
        chain.make_data()
        shutil.copytree(chain.disk / "data", room / "data", dirs_exist_ok=True)
        seconds = {}
        for stage in STAGES:
            began = time.monotonic()
            facts = cluster.wait(chain.submit(stage), chain.longest_seconds)
            seconds[stage] = round(time.monotonic() - began, 1)
            if facts["JobState"] != "COMPLETED":
                raise RuntimeError(f"{stage} of the undisturbed chain ended {facts['JobState']}")
        path.write_text(json.dumps({"seconds": seconds, "weights": chain.weights()}))
        chain.close(keep=True)
    return dict(json.loads(path.read_text())["seconds"])


def table(outcomes: list[Outcome]) -> str:
    """Events by kind, as it stands in docs/operations.md."""
    hits = [outcome for outcome in outcomes if outcome.hit]
    lines = ["| event | injected | finished | one message | by hand | starts again | weights equal |", "|---" * 7 + "|"]
    for event in [*sorted({outcome.event for outcome in hits}), "all"]:
        of_event = [outcome for outcome in hits if event in (outcome.event, "all")]
        endings = Counter(outcome.ending for outcome in of_event)
        counts = [str(endings[ending]) for ending in (FINISHED, REFUSED, BY_HAND)]
        again, compared = (
            sum(outcome.starts_again for outcome in of_event),
            [o for o in of_event if o.equal is not None],
        )
        equal = f"{sum(bool(outcome.equal) for outcome in compared)} of {len(compared)}"
        lines.append("| " + " | ".join([event, str(len(of_event)), *counts, str(again), equal]) + " |")
    for name in ("seconds_to_leave", "seconds_to_step"):
        values = sorted(value for outcome in hits if (value := getattr(outcome, name)) is not None)
        if values:
            tail = values[int(0.9 * len(values))]
            lines.append(f"{name}: {len(values)} measured, median {statistics.median(values)}, nine tenths {tail}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", type=Path)
    parser.add_argument("--chains", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first chain; two rooms share the work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefer", nargs="*", default=(), help="kinds that a stage meets if it can: hang, ...")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    room = asked.room.resolve()
    path = asked.results or room / "events.json"
    known = [Outcome(**facts) for facts in json.loads(path.read_text())] if path.exists() else []
    if asked.table:
        print(table(known))
        return
    room.mkdir(parents=True, exist_ok=True)
    compile_clock(room)
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cluster = Cluster(Path(__file__).with_name("cluster.sh"), room / "slurm", {**os.environ, "PATH": programs})
    cluster.start(nodes=3)
    done = {outcome.chain for outcome in known if outcome.equal is not None}
    try:
        usual = undisturbed(cluster, room)
        for number in [number for number in range(asked.first, asked.first + asked.chains) if number not in done]:
            before = [outcome for outcome in known if outcome.chain != number]

            def save(found: list[Outcome], before: list[Outcome] = before) -> None:
                known[:] = before + found
                lines = ",\n".join(json.dumps(asdict(outcome)) for outcome in known)
                path.write_text(f"[\n{lines}\n]\n")

            try:
                disturbed(cluster, room, number, asked, usual, save)
            except (RuntimeError, AssertionError) as error:
                say(f"chain {number} is given up: {error}")
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
