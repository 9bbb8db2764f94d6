"""`pretrain` from settings to exit code: build, run, close."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_retro.artifacts.files import require_room, write_file
from megatron_retro.assembly.retrofitting import (
    WHOLE_MODEL_SECTIONS,
    collapsed,
    inherited_settings,
    parameter_sources,
)
from megatron_retro.assembly.run_parts import RunParts, build_run_parts, resolved_settings
from megatron_retro.assembly.stage_building import checkpoint_bytes, model_on_meta, trained_parts
from megatron_retro.checkpoint.directory import clear_unfinished, point_to_newest, run_lock
from megatron_retro.checkpoint.loading import describe_checkpoint, open_checkpoint
from megatron_retro.checkpoint.training_state import TrainingState
from megatron_retro.config.data import DataConfig, TokenizerConfig
from megatron_retro.config.hardware import known_accelerator
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.sections import require_legal
from megatron_retro.config.settings import Settings
from megatron_retro.config.toml_files import render_toml
from megatron_retro.config.training import CheckpointConfig, ObservabilityConfig, TrainingConfig
from megatron_retro.data.dataset import Dataset
from megatron_retro.data.model_text import keep_text_files
from megatron_retro.data.tokenizers import Tokenizer, build_tokenizer
from megatron_retro.errors import ConfigError, Requeue
from megatron_retro.model.costs import model_costs
from megatron_retro.model.retro import count_parameters
from megatron_retro.ops.agreement import settle_kernels
from megatron_retro.ops.backends import backend_rows
from megatron_retro.optim.optimizer import optimizer_rows
from megatron_retro.optim.schedule import run_length
from megatron_retro.peft.attach import trainable_table
from megatron_retro.runtime.console import render_table, say
from megatron_retro.runtime.heartbeat import Heartbeat, start_heartbeat
from megatron_retro.runtime.launch import Launch, find_launch
from megatron_retro.runtime.process_group import agree, process_group
from megatron_retro.runtime.run_log import CONFIG, CULPRITS, EVENTS, FLIGHT, RANKS
from megatron_retro.runtime.run_records import RunFacts
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.runtime.standstill import Standstill
from megatron_retro.runtime.store_channel import open_channel
from megatron_retro.training.checkpoints import RunCheckpoints
from megatron_retro.training.console_lines import ConsoleLines
from megatron_retro.training.evaluator import Evaluator
from megatron_retro.training.loop import Ending, Outcome, Trainer
from megatron_retro.training.observers import (
    GarbageCollection,
    JsonLines,
    Observer,
    Observers,
    ProfilerWindow,
    RankLines,
)
from megatron_retro.training.trackers import build_trackers
from megatron_retro.training.watches import FallingThroughput, PaceOfRank, SlowRanks, StoreReads


def pretrain(settings: Settings) -> None:
    """Train; raises `Requeue` when the run stopped before its end with its state saved."""
    _run(settings, find_launch())


def retrofit(settings: Settings) -> None:
    """Train a Retro that starts from a GPT's decoder, whose shape and tokenizer it takes over."""
    source = settings[CheckpointConfig].load
    if source is None:
        raise ConfigError("retrofit starts from a model", fix="give --load, the directory of a GPT's run")
    settings = inherited_settings(settings, describe_checkpoint(Path(source))).replace(retro_add_retriever=True)
    _run(settings, find_launch(), retrofit=True)


def finetune(settings: Settings) -> None:
    """Train a finished model on conversations: all of it, or what `--peft-method` puts beside it."""
    launch = find_launch()
    settings = _finetune_settings(settings)
    table = trainable_table(model_on_meta(settings))  # every rank hears what this refuses
    if launch.rank == 0:
        say(table)
    _run(settings, launch)


def _finetune_settings(settings: Settings) -> Settings:
    """The model's own settings, its weights taken over, everything else fresh."""
    source = settings[CheckpointConfig].load
    if source is None:
        raise ConfigError("finetune starts from a model", fix="give --load, the directory of a GPT's or Retro's run")
    described = describe_checkpoint(Path(source))
    return inherited_settings(settings, described, WHOLE_MODEL_SECTIONS).replace(finetune=True)


def _run(settings: Settings, launch: Launch, *, retrofit: bool = False) -> None:
    """Train on these processes, in a run's directory of its own."""
    require_legal(settings, launch.world_size)
    run_length(settings[TrainingConfig])
    stops = _stop_requests(settings)
    minutes = settings[ParallelConfig].distributed_timeout_minutes
    save = settings[CheckpointConfig].save
    flights = None if save is None else Path(save) / FLIGHT
    with process_group(launch, timeout_minutes=minutes, flights=flights) as device:
        tokenizer = build_tokenizer(settings[TokenizerConfig])
        settings = resolved_settings(settings, tokenizer)
        if retrofit:
            open_channel("retrofit").first(lambda: _told_sources(settings))
        with _owned_run(settings, launch):
            outcome = train(settings, tokenizer, launch, device, stops, retrofit=retrofit)
    finish(settings, outcome)


def _told_sources(settings: Settings) -> str:
    """Tell where each parameter of the new model comes from, on the first rank, before anything is built."""
    checkpoint = open_checkpoint(Path(settings[CheckpointConfig].load or ""))
    rows = [
        (row.parameter, "x".join(map(str, row.shape)) or "1", row.source, "yes" if row.trains else "no")
        for row in collapsed(parameter_sources(settings, checkpoint))
    ]
    say(render_table(("parameter", "shape", "source", "trains?"), rows))
    return ""


def train(
    settings: Settings,
    tokenizer: Tokenizer,
    launch: Launch,
    device: torch.device,
    stops: StopRequests,
    *,
    retrofit: bool = False,
) -> Outcome:
    """Build and run inside an open process group."""
    settle_kernels(device)
    parts = build_run_parts(settings, tokenizer, device, launch.world_size, draw=False)  # a checkpoint may give values
    fields = {name: value for section in settings.values().values() for name, value in section.items()}
    agree({**fields, **parts.inputs}, "settings or data")
    timeout = timedelta(minutes=settings[ParallelConfig].distributed_timeout_minutes)
    channel = open_channel("checkpoints", timeout=timeout)
    state = TrainingState()
    with ExitStack() as closing:
        save = settings[CheckpointConfig].save
        heartbeat = start_heartbeat(run=None if save is None else Path(save), timeout=timeout)
        if heartbeat is not None:
            closing.callback(heartbeat.close)
        else:
            _watch_reads(parts, timeout, closing)
        observer = Observers(build_observers(parts, launch, heartbeat))
        closing.callback(observer.ended)
        closing.callback(parts.loader.close)
        if parts.validation is not None:
            closing.callback(parts.validation.close)
        checkpoints = RunCheckpoints(parts, state, channel, launch.rank, observer.happened)
        checkpoints.resume(retrofit=retrofit)
        if checkpoints.run is not None and launch.rank == 0:
            write_file(checkpoints.run / CONFIG, render_toml(parts.settings))
        evaluator = Evaluator(parts) if parts.validation is not None else None
        facts = run_facts(parts, launch)
        # Before, there is nothing to save, and a rank that waits for its peers hears no handler: a signal ends it.
        listening = stops.listening() if settings[TrainingConfig].exit_signal_handler else nullcontext()
        with listening:
            return Trainer(parts, facts, state, checkpoints, evaluator, observer, stops, heartbeat).run()


def _watch_reads(parts: RunParts, timeout: timedelta, closing: ExitStack) -> None:
    """A process that is alone ends itself when its data does not come."""
    where = ", ".join(parts.settings[DataConfig].data_path or ()) or "the data"
    standstill = Standstill(timeout.total_seconds(), where)
    closing.callback(standstill.close)
    for loader in (parts.loader, parts.validation):
        if loader is not None:
            loader.standstill = standstill


def finish(settings: Settings, outcome: Outcome) -> None:
    """Turn an early stop into the exit code that asks to be started again."""
    if outcome.ending is Ending.FINISHED:
        return
    save = settings[CheckpointConfig].save
    kept = f"the state is saved under {save}" if save else "nothing was saved: there is no --save"
    request = Requeue(f"the run stopped early: {outcome.reason}; {kept}", fix="run the same command again to go on")
    request.exit_code = settings[TrainingConfig].exit_on_requeue_code
    raise request


def _stop_requests(settings: Settings) -> StopRequests:
    minutes = settings[TrainingConfig].exit_duration_in_mins
    return StopRequests(None if minutes is None else minutes * 60)


@contextmanager
def _owned_run(settings: Settings, launch: Launch) -> Iterator[None]:
    """The run's directory, locked by the first rank, cleared of what killed runs left."""
    save = settings[CheckpointConfig].save
    if save is None:
        yield
        return
    run = Path(save)
    with run_lock(run) if launch.rank == 0 else nullcontext():
        if launch.rank == 0:
            clear_unfinished(run)
            point_to_newest(run)
            require_room(run, checkpoint_bytes(settings))
            (run / CULPRITS).unlink(missing_ok=True)
            keep_text_files(settings[TokenizerConfig], run)
        dist.barrier()
        yield


def build_observers(parts: RunParts, launch: Launch, heartbeat: Heartbeat | None) -> list[Observer]:
    """What watches this rank."""
    config = parts.settings[ObservabilityConfig]
    save = parts.settings[CheckpointConfig].save
    run = Path(save) if save is not None else None
    observers: list[Observer] = []

    def tell(event: str, facts: dict[str, Any]) -> None:
        Observers(observers).happened(event, facts)

    if config.manual_gc_interval:
        observers.append(GarbageCollection(config.manual_gc_interval))
    if heartbeat is not None:
        observers.append(PaceOfRank(heartbeat))
    if parts.model.is_reporter:
        observers.append(FallingThroughput(tell))
        if isinstance(dataset := parts.loader.dataset, Dataset):
            observers.append(StoreReads(lambda: dataset.traffic, config.log_interval, tell))
        if heartbeat is not None:
            stages = parts.settings[ParallelConfig].pipeline_model_parallel_size
            observers.append(SlowRanks(heartbeat, launch.world_size // stages, tell))
        observers.append(ConsoleLines(config.log_interval, config.log_throughput))
        if run is not None:
            observers.append(JsonLines(run / EVENTS))
        fields = {name: value for section in parts.settings.values().values() for name, value in section.items()}
        observers += build_trackers(config, run, fields)
    if run is not None and launch.world_size > 1:
        observers.append(RankLines(run / RANKS / f"rank-{launch.rank:05}.jsonl", config.log_interval))
    if config.profile:
        where = (run or Path()) / "profile" / f"rank-{launch.rank:05}.json"
        observers.append(ProfilerWindow(where, config.profile_step_start, config.profile_step_end))
    return observers


def run_facts(parts: RunParts, launch: Launch) -> RunFacts:
    """What observers are told once."""
    settings = parts.settings
    length = settings[DataConfig].seq_length
    costs = model_costs(settings[ModelConfig], settings[RetroConfig], length)
    device = parts.model.device.type
    peak = settings[ObservabilityConfig].peak_tflops
    if peak is None and device == "cuda":
        known = known_accelerator(torch.cuda.get_device_name(parts.model.device))
        peak = None if known is None else known.peak_tflops
    return RunFacts(
        rank=launch.rank,
        world_size=launch.world_size,
        is_reporter=parts.model.is_reporter,
        parameters=count_parameters(settings[ModelConfig], settings[RetroConfig]),
        flops_per_token=costs.training_flops(trained_parts(settings)),
        peak_flops=None if peak is None else peak * 1e12,
        total_samples=parts.total_samples,
        seq_length=length,
        inputs=dict(parts.inputs),
        backends=dict([*backend_rows(device), *optimizer_rows(device)]),
    )
