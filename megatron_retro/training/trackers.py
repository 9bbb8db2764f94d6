"""Curves for other programs: TensorBoard, Weights & Biases, MLflow, Prometheus; and alarms for a command of the user's.

`Curves` names the numbers of a run once; a sink takes them. Sinks import their package when they are asked for.
"""

from __future__ import annotations

import shlex
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_retro.artifacts.files import make_folder
from megatron_retro.config.training import ObservabilityConfig
from megatron_retro.errors import ConfigError, EnvironmentProblem
from megatron_retro.runtime.console import say
from megatron_retro.runtime.environment import require
from megatron_retro.runtime.run_records import EvaluationRecord, RetrievalHealth, StepRecord
from megatron_retro.runtime.strict_json import json_text
from megatron_retro.training.console_lines import ALARMS
from megatron_retro.training.observers import BlankObserver

_OF_A_STEP = ("loss", "gradient_norm", "learning_rate", "batch_size", "loss_scale", "step_seconds")


class Sink(Protocol):
    """Takes named numbers of a step."""

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Curves(BlankObserver):
    """What a run tells, as named numbers, to a sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._alarms = 0

    def stepped(self, record: StepRecord) -> None:
        values = {f"train/{name}": float(getattr(record, name)) for name in _OF_A_STEP}
        values["train/tokens"] = float(record.tokens)
        values["train/tokens_per_second"] = record.positions / max(record.step_seconds, 1e-9)
        values["train/memory_bytes"] = float(record.memory_bytes)
        values |= {f"train/{name}": loss for name, loss in record.extra_losses.items()}
        values |= {f"seconds/{name}": seconds for name, seconds in record.seconds.items()}
        values["seconds/waiting"] = record.waiting_seconds
        self._sink.write(values, record.step)

    def evaluated(self, record: EvaluationRecord) -> None:
        values = {"validation/loss": record.loss, "retrieval/alarms": float(len(record.alarms))}
        health = record.retrieval or RetrievalHealth()
        for variant, cost in health.excess.items():
            for name, value in (("", cost.mean), ("_low", cost.low), ("_high", cost.high)):
                values[f"retrieval/excess_{variant}{name}"] = value
        values |= {f"retrieval/share_layer_{use.layer}": use.share for use in health.layers}
        self._sink.write(values, record.step)

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        if event in ALARMS:
            self._alarms += 1
            self._sink.write({"train/alarms": float(self._alarms)}, int(facts.get("step", 0)))

    def ended(self) -> None:
        self._sink.close()


class TensorBoardSink:
    """Event files for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        require("tensorboard", "--tensorboard-dir")
        from torch.utils.tensorboard import SummaryWriter

        make_folder(directory)
        self._writer: Any = SummaryWriter(str(directory))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases; a run that is started again goes on in the same one."""

    def __init__(self, project: str, name: str, settings: Mapping[str, Any], directory: Path) -> None:
        require("wandb", "--wandb-project")
        import wandb

        make_folder(directory)
        kept = directory / "wandb.run"
        identity = kept.read_text(encoding="utf-8") if kept.exists() else uuid.uuid4().hex[:8]
        kept.write_text(identity, encoding="utf-8")
        self._run: Any = wandb.init(
            project=project, name=name, id=identity, resume="allow", dir=str(directory), config=dict(settings)
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """A run of MLflow; a run that is started again goes on in the same one."""

    def __init__(self, address: str, experiment: str, name: str, settings: Mapping[str, Any], directory: Path) -> None:
        require("mlflow", "--mlflow-tracking-uri")
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(address)
        found = self._client.get_experiment_by_name(experiment)
        identity = self._client.create_experiment(experiment) if found is None else found.experiment_id
        make_folder(directory)
        kept = directory / "mlflow.run"
        if kept.exists():
            self._run = kept.read_text(encoding="utf-8")
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(identity, run_name=name).info.run_id
            kept.write_text(self._run, encoding="utf-8")
            for field, value in settings.items():
                self._client.log_param(self._run, field, str(value)[:500])

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name.replace(" ", "_"), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class PrometheusSink:
    """The newest numbers as gauges, in a file for node_exporter, on a port, or both."""

    def __init__(self, path: Path | None, port: int | None, host: str) -> None:
        require("prometheus_client", "--prometheus-file and --prometheus-port")
        import prometheus_client

        self._package: Any = prometheus_client
        self._registry = prometheus_client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._path = path
        self._server: Any = None
        if path is not None:
            make_folder(path.parent)
        if port is not None:
            try:
                self._server, _ = prometheus_client.start_http_server(port, addr=host, registry=self._registry)
            except OSError as error:
                raise EnvironmentProblem(
                    f"--prometheus-port {port} cannot be listened to at {host}", got=error, fix="give a free port"
                ) from None

    @property
    def port(self) -> int:
        """The port that is listened to; a free one was taken for 0."""
        return int(self._server.server_port)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in {**values, "step": float(step)}.items():
            gauge = "megatron_retro_" + "".join(each if each.isalnum() else "_" for each in name)
            if gauge not in self._gauges:
                self._gauges[gauge] = self._package.Gauge(gauge, name, registry=self._registry)
            self._gauges[gauge].set(value)
        if self._path is not None:
            self._package.write_to_textfile(str(self._path), self._registry)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class AlertCommand(BlankObserver):
    """Starts a command for each alarm: `COMMAND EVENT TEXT`, with the facts as JSON on its standard input.

    Nobody waits for it, and what it says goes where the run's own words go.
    """

    def __init__(self, command: str) -> None:
        self._words = shlex.split(command)
        self._started: list[subprocess.Popen[str]] = []
        if not self._words:
            raise ConfigError("--alert-command is empty", expected="a program and its first words")

    def evaluated(self, record: EvaluationRecord) -> None:
        if record.alarms:
            self._alert("neighbours not used", {"step": record.step, "reasons": list(record.alarms)})

    def happened(self, event: str, facts: dict[str, Any]) -> None:
        if event in ALARMS:
            self._alert(event, facts)

    def ended(self) -> None:
        for process in self._started:
            process.poll()  # no zombies; a command that still runs goes on alone

    def _alert(self, event: str, facts: Mapping[str, Any]) -> None:
        text = ", ".join(f"{name} {value}" for name, value in facts.items())
        try:
            process = subprocess.Popen(
                [*self._words, event, text], stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            assert process.stdin is not None
            with process.stdin as stream:
                stream.write(json_text({"event": event, **facts}, default=str) + "\n")
            self._started.append(process)
        except OSError as error:
            say(f"--alert-command could not be started: {error}")


def build_trackers(
    config: ObservabilityConfig, run: Path | None, settings: Mapping[str, Any]
) -> Sequence[BlankObserver]:
    """The sinks and the command that the settings ask for."""
    name, directory = (run.name, run) if run is not None else ("run", Path())
    sinks: list[Callable[[], Sink]] = []
    if config.tensorboard_dir is not None:
        sinks.append(lambda: TensorBoardSink(Path(config.tensorboard_dir or "")))
    if config.wandb_project is not None:
        sinks.append(lambda: WandbSink(config.wandb_project or "", config.wandb_exp_name or name, settings, directory))
    if config.mlflow_tracking_uri is not None:
        address, experiment = config.mlflow_tracking_uri, config.mlflow_experiment
        sinks.append(lambda: MlflowSink(address, experiment, name, settings, directory))
    if config.prometheus_file is not None or config.prometheus_port is not None:
        path = None if config.prometheus_file is None else Path(config.prometheus_file)
        sinks.append(lambda: PrometheusSink(path, config.prometheus_port, config.prometheus_host))
    found: list[BlankObserver] = [Curves(sink()) for sink in sinks]
    if config.alert_command is not None:
        found.append(AlertCommand(config.alert_command))
    return found
