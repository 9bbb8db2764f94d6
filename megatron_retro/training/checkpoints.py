"""A run's state to disk and back: what the loop saves, and where it takes up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_retro.assembly.run_parts import MODEL_SECTIONS, RunParts
from megatron_retro.assembly.stage_building import trained_parts, trains, uses_peft
from megatron_retro.assembly.warm_start import start_from_decoder, starts_from_decoder
from megatron_retro.checkpoint.directory import complete_checkpoints, set_aside
from megatron_retro.checkpoint.live_state import (
    MODEL,
    OPTIMIZER,
    create_moments,
    model_tensors,
    optimizer_tensors,
    padded_rows,
    random_tensors,
)
from megatron_retro.checkpoint.loading import (
    Checkpoint,
    changed_settings,
    described_changes,
    load_tensors,
    open_together,
    require_same_model,
    require_tensors,
)
from megatron_retro.checkpoint.saver import Saver, Snapshot
from megatron_retro.checkpoint.training_state import TrainingState
from megatron_retro.config.data import DataConfig, InstructionConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import section_name
from megatron_retro.config.training import CheckpointConfig, OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.errors import ArtifactError, ConfigError, DamagedArtifact
from megatron_retro.runtime.seeds import derived_seed, random_states, restore_random_states, seed_everything
from megatron_retro.runtime.store_channel import StoreChannel

# settings that may differ between the run that saved and the run that loads
FREE_MODEL_SETTINGS = (
    "make_vocab_size_divisible_by",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "retro_encoder_hidden_dropout",
    "retro_encoder_attention_dropout",
    "retro_num_neighbors",
    "retro_attention_gate",
    "retro_gate_target_rate",
    "retro_gate_budget_weight",
    "retro_gate_budget_warmup",
    "retro_init",
    "retro_init_output_scale",
    "retro_zero_init_output",
    "lora_dropout",
    "peft_load",
)


@dataclass(frozen=True)
class Taken:
    """What a checkpoint gives beside its weights; a run that goes on takes everything, whatever it does with --load."""

    optimizer: bool = True
    random: bool = True
    position: bool = True


EVERYTHING = Taken()

# the model with what is tuned beside it
TUNED_SECTIONS = (*MODEL_SECTIONS, PeftConfig)
# settings whose change is told when a run goes on
TOLD_SECTIONS = (*MODEL_SECTIONS, DataConfig, TokenizerConfig, TrainingConfig, OptimizerConfig, ParallelConfig)
# settings that can change the order of samples, and settings of those sections that cannot
_ORDER_SECTIONS = (DataConfig, TokenizerConfig, InstructionConfig)
_ORDER_SETTINGS = {
    TrainingConfig: ("seed",),
    RetroConfig: ("retro_num_neighbors",),
}
_NOT_OF_THE_ORDER = ("num_workers", "data_cache_path", "valid_data_path", "valid_neighbor_path", "max_data_epochs")

Report = Callable[[str, dict[str, Any]], None]


class RunCheckpoints:
    """Saves and restores one run. Every rank has one and calls the same methods; `report` hears of it."""

    def __init__(self, parts: RunParts, state: TrainingState, channel: StoreChannel, rank: int, report: Report) -> None:
        config = parts.settings[CheckpointConfig]
        self._report = report
        self._kept: dict[str, Any] | None = None  # the counters of what is on disk
        self._parts, self._state, self._channel, self._rank = parts, state, channel, rank
        self._config = config
        self.run = Path(config.save) if config.save is not None else None
        create_moments(parts.model.module, parts.optimizer.inner)
        model = model_tensors(parts.model.module)
        self._base = {
            name: tensor
            for name, tensor in model.items()
            if uses_peft(parts.settings) and not trains(name.removeprefix(MODEL), trained_parts(parts.settings))
        }
        self._tensors = {
            **{name: tensor for name, tensor in model.items() if name not in self._base},
            **optimizer_tensors(parts.model.module, parts.optimizer.inner),
        }
        self._true_rows = padded_rows(self._tensors, parts.true_rows)
        self._saver = None
        if self.run is not None:
            self._saver = Saver(self.run, keep=config.keep_checkpoints, channel=channel, saved=self._saved)

    @property
    def can_save(self) -> bool:
        """Whether the run has a place for checkpoints."""
        return self._saver is not None

    def save(self, *, in_background: bool) -> None:
        """Write the run's state after the present step, unless that is what was written last."""
        if self._saver is None:
            return
        if self._kept == self._state.to_json():
            self._saver.wait()
            return
        self._kept = self._state.to_json()
        if self._parts.settings[ParallelConfig].check_replicas:
            self._parts.model.check_replicas()
        snapshot = self._snapshot()
        if in_background:
            self._saver.save_in_background(snapshot)
        else:
            self._saver.save(snapshot)

    def _saved(self, step: int) -> None:
        self._report("saved", {"step": step})

    def before_update(self) -> None:
        """Wait until a save in the background has its copy."""
        if self._saver is not None:
            self._saver.before_update()

    def finish(self) -> None:
        """Wait until everything is on disk."""
        if self._saver is not None:
            self._saver.wait()

    def _snapshot(self) -> Snapshot:
        parts = self._parts
        return Snapshot(
            step=self._state.step,
            tensors={**self._tensors, **random_tensors(self._rank, random_states())},
            true_rows=self._true_rows,
            state={
                "training": self._state.to_json(),
                "optimizer": parts.optimizer.state(),
                "loader": parts.loader.state(),
            },
            config=parts.settings.values(),
            inputs=dict(parts.inputs),
            counts={
                "step": self._state.step,
                "samples": self._state.samples,
                "tokens": self._state.tokens,
                "processes": self._channel.size,
            },
        )

    def resume(self, *, retrofit: bool = False) -> bool:
        """Take up the newest intact checkpoint of this run, else what --load names; False for a fresh start.

        With `retrofit`, --load names a GPT whose decoder is taken over while the rest stays fresh. What no checkpoint
        gives is drawn, and nothing else.

        A checkpoint of this run that is damaged is set aside, loudly, and the one before it is taken: nobody is there
        to ask when a cluster restarts a job. One that --load names is refused instead.
        """
        if self._base:
            self._take_base()
        while self.run is not None and (found := self._newest(self.run)) is not None:
            try:
                checkpoint = self._open(found)
                self._restore(checkpoint, EVERYTHING)
                self._kept = self._state.to_json()
                self._tell_changes(checkpoint)
                return True
            except DamagedArtifact as error:
                self._channel.barrier()
                self._channel.first(partial(_set_aside, found))
                self._clear_moments()
                self._report("damaged checkpoint", {"path": str(found), "reason": error.what})
        if self._config.load is None or self._base:
            self._draw_but(self._base if self._adapter is None else {**self._base, **self._tensors})
            return False
        source = self._open(Path(self._config.load))
        if retrofit:
            self._take_decoder(source)
            return False
        self._restore(source, self._taken_from_load())
        return not self._config.finetune

    def _take_base(self) -> None:
        """The frozen model of a run that tunes beside it (not in its checkpoints), and an adapter to start from."""
        if self._config.load is None:
            raise ConfigError("--peft-method tunes beside a model", fix="give --load, the directory of its run")
        base = self._open(Path(self._config.load))
        self._require_own_model(base, MODEL_SECTIONS)
        load_tensors(base, self._base, padded_rows(self._base, self._parts.true_rows), self._channel)
        if self._adapter is not None:
            adapter = self._open(Path(self._adapter))
            added = {name: tensor for name, tensor in self._tensors.items() if name.startswith(MODEL)}
            require_tensors(adapter, added, self._true_rows)
            load_tensors(adapter, added, self._true_rows, self._channel)

    @property
    def _adapter(self) -> str | None:
        return self._parts.settings[PeftConfig].peft_load if self._base else None

    def _draw_but(self, given: Iterable[str]) -> None:
        """First values for what no checkpoint gives."""
        self._parts.model.draw_first_values({name.removeprefix(MODEL) for name in given})

    def _clear_moments(self) -> None:
        """What a damaged checkpoint gave before its damage was met."""
        for name, tensor in self._tensors.items():
            if name.startswith(OPTIMIZER):
                tensor.detach().zero_()

    def _take_decoder(self, source: Checkpoint) -> None:
        """Every parameter that the GPT has; `assembly.retrofitting` has checked that it has the whole decoder."""
        known = {name: tensor for name, tensor in self._tensors.items() if name in source.index.sizes}
        decoder = {name: tensor for name, tensor in known.items() if name.startswith(MODEL)}
        load_tensors(source, decoder, self._true_rows, self._channel)
        model, retro = self._parts.settings[ModelConfig], self._parts.settings[RetroConfig]
        warm = retro.retro_init == "decoder"
        follows = [name for name in self._tensors if warm and starts_from_decoder(name.removeprefix(MODEL))]
        self._draw_but({*decoder, *follows})
        if warm:
            start_from_decoder(self._parts.model.module, source, model, retro)

    def _open(self, path: Path) -> Checkpoint:
        return open_together(path, self._channel, self._parts.model.device)

    def _newest(self, run: Path) -> Path | None:
        found = self._channel.first(lambda: "".join(map(str, complete_checkpoints(run)[-1:])))
        return Path(found) if found else None

    def roll_back(self) -> bool:
        """Return to the newest checkpoint of this run; False when there is none."""
        self.finish()
        newest = self._newest(self.run) if self.run is not None else None
        if newest is None:
            return False
        self._restore(self._open(newest), EVERYTHING)
        return True

    def _taken_from_load(self) -> Taken:
        config = self._config
        if config.finetune:
            return Taken(optimizer=False, random=False, position=False)
        return Taken(optimizer=not config.no_load_optim, random=not config.no_load_rng)

    def _restore(self, checkpoint: Checkpoint, taken: Taken) -> None:
        self._require_own_model(checkpoint, TUNED_SECTIONS if taken.position else MODEL_SECTIONS)
        wanted = {name: tensor for name, tensor in self._tensors.items() if name.startswith(MODEL) or taken.optimizer}
        require_tensors(checkpoint, wanted, self._true_rows)
        states = random_tensors(self._rank, random_states())
        kept = {name: state for name, state in states.items() if taken.random and _fits(checkpoint, name, state)}
        load_tensors(checkpoint, {**wanted, **kept}, self._true_rows, self._channel)
        if taken.optimizer:
            self._parts.optimizer.load_state(checkpoint.state["optimizer"])
        if taken.position:
            self._state.load_json(checkpoint.state["training"])
            self._take_position(checkpoint)
        if kept:
            restore_random_states({name.rsplit(".", 1)[1]: state for name, state in kept.items()})
        elif taken.random:
            seed_everything(derived_seed(checkpoint.step, "resumed", self._rank))

    def _take_position(self, checkpoint: Checkpoint) -> None:
        """The place in the data; refused with what changed when their order is another one now."""
        loader, saved = self._parts.loader, checkpoint.state["loader"]
        if saved["order"] == loader.dataset.fingerprint:
            loader.load_state(saved)
            return
        if saved["order"] is None:  # another program's run: its samples were drawn in an order of its own
            loader.seek(int(saved["consumed_samples"]))
            return
        if not self._config.allow_data_change:
            changed = changed_settings(checkpoint, self._sections(_ORDER_SECTIONS), _NOT_OF_THE_ORDER)
            for section, names in _ORDER_SETTINGS.items():
                values = {name: getattr(self._parts.settings[section], name) for name in names}
                changed |= changed_settings(checkpoint, {section_name(section): values})
            raise ArtifactError(
                f"{checkpoint.path} has read other data, or the same in another order",
                got=described_changes(changed) or "the same settings: the files that they name changed",
                fix="restore them; --allow-data-change goes on with the new ones; --finetune, with --load and a new "
                "--save, takes the weights alone",
            )
        self._state.bad_samples.clear()
        loader.seek(int(saved["consumed_samples"]))

    def _tell_changes(self, checkpoint: Checkpoint) -> None:
        changed = changed_settings(checkpoint, self._sections(TOLD_SECTIONS))
        if changed:
            facts = {flag: f"{there} -> {here}" for flag, (there, here) in changed.items()}
            self._report("settings changed", {"since step": checkpoint.step, **facts})

    def _sections(self, sections: Sequence[type]) -> dict[str, Any]:
        values = self._parts.settings.values()
        names = [section_name(section) for section in sections]
        return {name: values[name] for name in names if name in values}

    def _require_own_model(self, checkpoint: Checkpoint, sections: Sequence[type]) -> None:
        require_same_model(checkpoint, self._sections(sections), FREE_MODEL_SETTINGS)


def _set_aside(damaged: Path) -> str:
    return str(set_aside(damaged))


def _fits(checkpoint: Checkpoint, name: str, state: Tensor) -> bool:
    return list(checkpoint.index.sizes.get(name, ())) == list(state.size())
