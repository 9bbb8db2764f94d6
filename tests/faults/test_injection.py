"""Random faults over every artifact, on the path that every consumer takes: named or without effect, never a fault.

`pytest --full tests/faults` injects 10,000 and writes `tests/results/injected_faults.json`; a run that was stopped goes
on. By default a seeded part runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_retro.artifacts import block_checksums, verified
from tests.faults.injection import (
    CRASH,
    FAULTS,
    ROOT,
    SILENT,
    Consumer,
    Injector,
    Outcome,
    commit,
    kept_lines,
    seconds_since,
    table,
)
from tests.faults.world import CONSUMERS, train, write_world

SEED = 18
RESULTS = ROOT / "tests/results/injected_faults.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("faults")
    path = parent / "world"
    path.mkdir()
    write_world(path)
    return path


def test_nothing_damaged_is_read(folder: Path, count: Callable[[int, int], int]) -> None:
    wanted = count(84, 10_000)
    kept = ROOT / "build/injected_faults.jsonl" if wanted > 1000 else None
    before = {fault.number: fault for fault in (Outcome(**json.loads(line)) for line in kept_lines(kept))}
    start, outcomes = time.monotonic(), list(before.values())
    for outcome in Injector(folder, CONSUMERS, SEED).outcomes([n for n in range(wanted) if n not in before]):
        outcomes.append(outcome)
        if kept is not None:
            with kept.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(outcome)) + "\n")
    rows = table(outcomes)
    print("\n".join(str(row) for row in rows))
    if kept is not None:
        facts = {"seed": SEED, "commit": commit(), "seconds": seconds_since(start), "rows": rows}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    faults = [outcome for outcome in outcomes if outcome.result in FAULTS]
    assert not faults, "\n".join(map(str, faults[:20]))


def test_without_verification_faults_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the harness must see what the checksums keep out."""
    monkeypatch.setattr(verified, "_require_content", lambda *_: None)
    monkeypatch.setattr(block_checksums.CheckedContent, "require", lambda *_: None)
    blind = Consumer("train", train, ("project/neighbors/corpus/*.ids", "project/database/*.i64"))
    results = [outcome.result for outcome in Injector(folder, [blind], SEED).outcomes(range(12))]
    assert SILENT in results or CRASH in results, results
