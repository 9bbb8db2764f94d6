"""Curves reach the programs that draw them, alarms a command; a run that starts again goes on in the same curves."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.config.training import ObservabilityConfig
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.runtime import environment
from megatron_retro.runtime.run_records import EvaluationRecord, StepRecord
from megatron_retro.training.trackers import AlertCommand, Curves, PrometheusSink, build_trackers

STEP = StepRecord(step=7, loss=2.5, positions=640, tokens=600, seconds={"data": 0.5, "optimizer": 1.5})
EVALUATION = EvaluationRecord(step=7, seconds=1.0, loss=2.25, alarms=("the gate of layer 2 is shut",))


def test_prometheus_reads_the_newest_numbers_from_a_file_and_a_port(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    sink = PrometheusSink(tmp_path / "metrics/run.prom", 0, "127.0.0.1")
    curves = Curves(sink)
    curves.stepped(STEP)
    curves.evaluated(EVALUATION)
    curves.happened("slow rank", {"step": 7, "rank": 3})
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    with pytest.raises(EnvironmentProblem, match=f"--prometheus-port {sink.port} cannot be listened to"):
        PrometheusSink(None, sink.port, "127.0.0.1")
    curves.ended()
    for text in (page, (tmp_path / "metrics/run.prom").read_text()):
        lines = text.splitlines()
        assert "megatron_retro_train_loss 2.5" in lines and "megatron_retro_step 7.0" in lines
        assert "megatron_retro_train_tokens_per_second 320.0" in lines
        assert "megatron_retro_retrieval_alarms 1.0" in lines and "megatron_retro_train_alarms 1.0" in lines


def test_alarms_start_a_command_of_the_user_s(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "page me"
    program.write_text(f'#!/bin/sh\necho "$1/$2/$3/$(cat)" >>{tmp_path}/pages\n')
    program.chmod(0o755)
    alert = AlertCommand(f"'{program}' night")
    alert.happened("saved", {"step": 4})
    for happen in (
        lambda: alert.happened("throughput fell", {"step": 5, "usual": "2M"}),
        lambda: alert.evaluated(EVALUATION),
    ):
        happen()
        time.sleep(0.3)  # they are not waited for
    alert.ended()
    deadline = time.monotonic() + 10
    while len((tmp_path / "pages").read_text().splitlines()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    first, second = (tmp_path / "pages").read_text().splitlines()
    assert first.startswith("night/throughput fell/step 5, usual 2M/{") and second.startswith(
        "night/neighbours not used"
    )
    assert json.loads(first.split("/")[-1]) == {"event": "throughput fell", "step": 5, "usual": "2M"}
    AlertCommand("/nowhere").happened("bad step", {"step": 6})
    assert "--alert-command could not be started" in capfd.readouterr().err


def tracked(config: ObservabilityConfig, run: Path, steps: list[int]) -> None:
    """Two starts of a run, each with some steps."""
    for step in steps:
        for tracker in build_trackers(config, run, {"lr": 0.1}):
            tracker.stepped(StepRecord(step=step, loss=float(step)))
            tracker.ended()


def test_mlflow_has_one_run_over_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = f"file://{tmp_path}/store"
    config = ObservabilityConfig(mlflow_tracking_uri=address, mlflow_experiment="e")
    tracked(config, tmp_path / "runs/retro", [1, 2])
    client: Any = tracking.MlflowClient(address)
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0)]
    assert found.info.run_name == "retro" and found.data.params == {"lr": "0.1"} and found.info.status == "FINISHED"


def test_wandb_has_one_run_over_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked(ObservabilityConfig(wandb_project="p"), tmp_path / "retro", [1, 2])
    found = sorted((tmp_path / "retro/wandb").glob("offline-run-*"))
    identity = (tmp_path / "retro/wandb.run").read_text()
    assert found and all(path.name.endswith(identity) for path in found)
    assert sum(path.stat().st_size for folder in found for path in folder.glob("*.wandb")) > 100


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        ("wandb", {"wandb_project": "p"}),
        ("mlflow", {"mlflow_tracking_uri": "x"}),
        ("prometheus_client", {"prometheus_port": 0}),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(
    module: str, setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"needs the package .*which is not installed[\s\S]*megatron-retro\["):
        build_trackers(ObservabilityConfig(**setting), tmp_path, {})
