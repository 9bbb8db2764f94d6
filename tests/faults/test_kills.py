"""Kills of every stage that writes, at any moment: started again, it ends with the same bytes and leaves nothing else.

`pytest --full tests/faults/test_kills.py` kills each stage 200 times, what uses a model 40 times, and writes
`tests/results/kills.json`; a run that was stopped goes on. By default the conversions are killed a few times.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_retro.artifacts import files
from megatron_retro.data.preprocessing import job
from tests.faults.injection import ROOT, commit, kept_lines, seconds_since
from tests.faults.kills import Chain, Killer, Stage
from tests.faults.later_stages import write_later_stages
from tests.faults.stages import conversions, write_stages

SEED, ROUND, LATER = 18, 20, 40
RESULTS = ROOT / "tests/results/kills.json"


def chains_until(killer: Killer, wanted: int, known: list[Chain]) -> Iterator[Chain]:
    """Chains that are not known yet, until that many kills met the stage alive."""
    kills = sum(chain.kills for chain in known)
    while kills < wanted:
        chain = next(killer.chains(iter([len(known)])))
        known.append(chain)
        kills += chain.kills
        yield chain


def rows_of(chains: list[Chain]) -> list[dict[str, object]]:
    """Counts by stage."""
    groups = [(name, [c for c in chains if c.stage == name]) for name in {c.stage: 0 for c in chains}]
    return [
        {
            "stage": name,
            "kills": sum(chain.kills for chain in group),
            "runs that then ended": len(group),
            "not byte-equal, or not finished": sum(bool(chain.faults) for chain in group),
        }
        for name, group in groups
    ]


def test_a_killed_stage_ends_as_the_undisturbed_one(
    tmp_path: Path, count: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds, so that a run which is stopped tells of all stages."""
    monkeypatch.setattr(job, "SMALLEST_BLOCK", 30_000)
    wanted = count(4, 200)
    kept = ROOT / "build/kills.jsonl" if wanted == 200 else None
    start, chains = time.monotonic(), [Chain(**json.loads(line)) for line in kept_lines(kept)]
    stages, later = (write_stages if kept else conversions)(tmp_path), list[Stage]()
    if kept:
        later = write_later_stages(tmp_path, tmp_path / "build/query/ready")
    killers = [Killer(stage, SEED, tmp_path) for stage in [*later, *stages]]
    for goal in range(min(ROUND, wanted), wanted + 1, ROUND):
        for killer in killers[len(later) if goal > LATER else 0 :]:
            known = [chain for chain in chains if chain.stage == killer.stage.name]
            for chain in chains_until(killer, goal, known):
                chains.append(chain)
                if kept:
                    with kept.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(asdict(chain)) + "\n")
        if kept:
            facts = {"seed": SEED, "commit": commit(), "seconds": seconds_since(start), "rows": rows_of(chains)}
            RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("\n".join(map(str, rows_of(chains))))
    assert not [chain for chain in chains if chain.faults], "\n".join(str(c) for c in chains if c.faults)


def test_writing_in_place_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: without a temporary name, a kill leaves a half."""
    stage = conversions(tmp_path)[1]
    monkeypatch.setattr(files, "fresh_name", lambda path: path)
    chains = itertools.islice(Killer(stage, SEED, tmp_path).chains(itertools.count()), 20)
    assert any(chain.faults for chain in chains)
