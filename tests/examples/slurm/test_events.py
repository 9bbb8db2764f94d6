"""What was injected into the tiny chain (inject_events.py), and that docs/operations.md says the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from tests.examples.slurm.chain import Chain
from tests.examples.slurm.events import EVENTS, FAILURES, STAGES, compile_clock, draw_events, write_clock
from tests.examples.slurm.inject_events import BY_HAND, FINISHED, REFUSED, Disturbance, Outcome, table

ROOT = Path(__file__).resolve().parents[3]
OUTCOMES = [Outcome(**facts) for facts in json.loads((ROOT / "tests/results/slurm_events.json").read_text())]

MENDED = {"949bfad": "a job that finished just after its time limit starts again since d2ea9e2"}


def test_the_page_has_the_table_of_the_results() -> None:
    rows = [line for line in table(OUTCOMES).splitlines() if line.startswith("|")]
    assert "\n".join(rows) in (ROOT / "docs/operations.md").read_text()


def test_nothing_was_left_to_a_person_and_no_weight_differs() -> None:
    by_hand = [outcome.event for outcome in OUTCOMES if outcome.ending == BY_HAND and outcome.commit not in MENDED]
    assert by_hand == [] and all(outcome.equal is not False for outcome in OUTCOMES)
    assert {(outcome.stage) for outcome in OUTCOMES if outcome.hit} == set(STAGES)
    assert {outcome.event for outcome in OUTCOMES if outcome.hit} == {event for of in EVENTS.values() for event in of}


def test_a_job_meets_one_failure_at_most() -> None:
    for number in range(100):
        drawn = draw_events("retrofit", 3, random.Random(number))
        assert len(drawn) == 3 and sum(event in FAILURES for event in drawn) <= 1
        assert drawn == draw_events("retrofit", 3, random.Random(number))


def test_the_message_of_a_full_disk_is_no_other_events() -> None:
    """What came before it goes on with the stage, as what came after; a limit that was never met is no event."""
    refused, finished = "failed with code 2 " + 300 * ".", "finished after 20 s"

    class Stage:
        room, longest_seconds = Path("room"), 1.0
        states, words = iter([{"FAILED"}, {"COMPLETED"}]), iter([refused, finished])

        def __init__(self) -> None:
            self.cluster = SimpleNamespace(wait=lambda *_: None, states=lambda _: next(self.states))

        def free_disk(self) -> None: ...

        def set_clock(self, seconds: float) -> None: ...

        def last_words(self, stage: str, job: int) -> str:
            return next(self.words)

    stage = Disturbance(cast(Chain, Stage()), 0, "retrofit", random.Random(0), 1.0)
    events = [Outcome(0, "retrofit", event, 1.0, True) for event in ("TERM", "full disk")]
    events[0].message = "saved, starts again"
    assert stage._end(1, events) == REFUSED and [event.ending for event in events] == ["", REFUSED]
    events.append(Outcome(0, "retrofit", "time limit", 1.0, True))
    assert stage._end(2, events) == FINISHED
    assert [event.ending for event in events] == [FINISHED, REFUSED, FINISHED]
    assert [event.message for event in events] == ["saved, starts again", refused[-300:], finished]
    assert [event.hit for event in events] == [True, True, False]


def test_the_second_rank_has_a_clock_of_its_own(tmp_path: Path) -> None:
    library, file = compile_clock(tmp_path), tmp_path / "clock"
    write_clock(file, 3600.0)
    times = []
    for rank in ("0", "1"):
        environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_FILE": str(file), "SLURM_PROCID": rank}
        words = [sys.executable, "-c", "import time; print(time.time())"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    assert 3600 <= times[1] - times[0] < 3660
