"""Records survive the event log, and logs of older versions still open."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.run_log import EVENTS, RANKS, read_rank_steps, read_run_log
from megatron_retro.runtime.run_records import EvaluationRecord, HeldOutSamples, LayerUse, RetrievalHealth, StepRecord
from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import from_plain, json_text, to_plain

# As the first version wrote it: no positions, no checksums, no documents, numbers that are not finite as text.
FIRST_VERSION = (
    {"event": "started", "step": 0, "rank": 0, "world_size": 2, "parameters": 7, "seq_length": 64},
    {"event": "step", "step": 1, "samples": 4, "loss": 5, "gradient_norm": "inf", "seconds": {"data": 2}},
    {"event": "evaluation", "step": 1, "seconds": 1, "loss": 5.4, "alarms": ["shut"], "facts": {
        "tokens": 99, "samples": {"losses": [9.0], "tokens": [2]}, "losses": {"real": [5.4, 5.0, 6.0]},
        "excess": {"none": [0.1, "nan", None]}, "layers": [{"layer": 3, "share": 0.2, "gate_rate": None}]}},
)  # fmt: skip


def test_a_log_of_the_first_version_opens(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in FIRST_VERSION))
    log = read_run_log(tmp_path)
    assert (log.facts.world_size, log.facts.parameters, log.starts) == (2, 7, [0])
    assert log.steps[0].gradient_norm == math.inf and log.steps[0].positions == 0 and log.training_seconds == 2
    (record,) = log.evaluations
    assert record.alarms == ("shut",) and record.samples is not None and record.samples.texts == ()
    ((step, health),) = log.health
    assert step == 1 and health.excess["none"].mean == 0.1 and math.isnan(health.excess["none"].low)
    assert health.layers == (LayerUse(3, 0.2, None),) and health.excess_by_position == {}


def test_what_is_no_event_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "evaluation", "step": 1}) + "\n")
    with pytest.raises(ArtifactError, match="none of a run's"):
        read_run_log(tmp_path)


def test_records_come_back_as_they_were_written() -> None:
    health = RetrievalHealth(
        {"real": Interval(2.0, 1.5, 2.5)}, {"none": Interval(0.5, 0.25, 0.75)}, {"none": (0.5, 0.25)},
        (LayerUse(1, 0.5, 0.25),),
    )  # fmt: skip
    samples = HeldOutSamples((2.0,), (8,), (17,), (3,))
    for record in (
        EvaluationRecord(7, 1.5, 2.0, 8, samples, health, ("an alarm",)),
        EvaluationRecord(7, 1.5, 2.0),
        StepRecord(3, 12, 96, 4, 128, 2.0, 0.5, 1e-3, False, True, 512.0, {"gate": 0.5}, {"data": 0.25}, 10),
    ):
        assert from_plain(type(record), json.loads(json_text(to_plain(record)))) == record


NO_EVENTS = (b"{cut", b"\xff\xfe", b"[]", b'"text"', b"{}", b'{"event": "saved", "step": 1e999}', b"[" * 9999)


@pytest.mark.parametrize("line", NO_EVENTS, ids=range(len(NO_EVENTS)))
def test_a_damaged_log_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / EVENTS).write_bytes(line + b"\n")
    with pytest.raises(ArtifactError, match="event that is none of a run's"):
        read_run_log(tmp_path)


@pytest.mark.parametrize("line", [b"{cut}\n", b"{}\n"])
def test_a_damaged_log_of_a_rank_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / RANKS / "rank-00001.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(line)
    with pytest.raises(ArtifactError, match="no step of a rank"):
        read_rank_steps(tmp_path)
