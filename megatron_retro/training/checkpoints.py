"""A run's state to disk and back: what the loop saves, and where it takes up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_retro.assembly.run_parts import MODEL_SECTIONS, RunParts
from megatron_retro.assembly.stage_building import is_tuned, trains
from megatron_retro.checkpoint.directory import complete_checkpoints, set_aside
from megatron_retro.checkpoint.live_state import (
    MODEL,
    create_moments,
    model_tensors,
    optimizer_tensors,
    padded_rows,
    random_tensors,
)
from megatron_retro.checkpoint.loading import (
    Checkpoint,
    load_tensors,
    open_checkpoint,
    require_same_model,
    require_tensors,
)
from megatron_retro.checkpoint.saver import Saver, Snapshot
from megatron_retro.config.checkpoint import CheckpointConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.peft import PeftConfig
from megatron_retro.config.settings import section_name
from megatron_retro.errors import ConfigError, DamagedArtifact
from megatron_retro.runtime.seeds import derived_seed, random_states, restore_random_states, seed_everything
from megatron_retro.training.state import TrainingState

# settings that may differ between the run that saved and the run that loads
FREE_MODEL_SETTINGS = (
    "make_vocab_size_divisible_by",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "retro_encoder_hidden_dropout",
    "retro_encoder_attention_dropout",
    "retro_num_neighbors",
    "retro_no_retrieval_probability",
    "retro_random_retrieval_probability",
    "retro_attention_gate",
    "retro_gate_target_rate",
    "retro_gate_budget_weight",
    "retro_gate_budget_warmup",
    "retro_zero_init_output",
)


@dataclass(frozen=True)
class Taken:
    """What a checkpoint gives beside its weights; a run that goes on takes everything, whatever it does with --load."""

    optimizer: bool = True
    random: bool = True
    position: bool = True


EVERYTHING = Taken()


class RunCheckpoints:
    """Saves and restores one run. Every rank has one and calls the same methods."""

    def __init__(self, parts: RunParts, state: TrainingState, group: dist.ProcessGroup, rank: int) -> None:
        config = parts.settings[CheckpointConfig]
        self._parts, self._state, self._group, self._rank = parts, state, group, rank
        self._config = config
        self.run = Path(config.save) if config.save is not None else None
        create_moments(parts.trainable.module, parts.optimizer.inner)
        model = model_tensors(parts.trainable.module)
        self._base = {
            name: tensor
            for name, tensor in model.items()
            if is_tuned(parts.settings) and not trains(name.removeprefix(MODEL), parts.settings)
        }
        self._tensors = {
            **{name: tensor for name, tensor in model.items() if name not in self._base},
            **optimizer_tensors(parts.trainable.module, parts.optimizer.inner),
        }
        self._true_rows = padded_rows(self._tensors, parts.true_rows)
        self._saver = Saver(self.run, keep=config.keep_checkpoints, group=group) if self.run is not None else None

    @property
    def can_save(self) -> bool:
        """Whether the run has a place for checkpoints."""
        return self._saver is not None

    def save(self, *, in_background: bool) -> None:
        """Write the run's state after the present step."""
        if self._saver is None:
            return
        if self._parts.settings[ParallelConfig].check_replicas:
            self._parts.trainable.check_replicas()
        snapshot = self._snapshot()
        if in_background:
            self._saver.save_in_background(snapshot)
        else:
            self._saver.save(snapshot)

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
                "processes": dist.get_world_size(self._group),
            },
        )

    def resume(self, report: Callable[[str, dict[str, Any]], None], *, retrofit: bool = False) -> bool:
        """Take up the newest intact checkpoint of this run, else what --load names; False for a fresh start.

        With `retrofit`, --load names a GPT whose decoder is taken over while the rest stays fresh.

        A checkpoint of this run that is damaged is set aside, loudly, and the one before it is taken: nobody is there
        to ask when a cluster restarts a job. One that --load names is refused instead.
        """
        if self._base:
            self._take_base()
        while self.run is not None and (found := self._newest(self.run)) is not None:
            try:
                self._restore(open_checkpoint(found), EVERYTHING)
                return True
            except DamagedArtifact as error:
                dist.barrier(self._group)
                if self._rank == 0:
                    set_aside(found)
                dist.barrier(self._group)
                report("damaged checkpoint", {"path": str(found), "reason": error.what})
        if self._config.load is None or self._base:
            return False
        source = open_checkpoint(Path(self._config.load))
        if retrofit:
            self._take_decoder(source)
            return False
        self._restore(source, self._taken_from_load())
        return not self._config.finetune

    def _take_base(self) -> None:
        """The frozen model of a run that tunes beside it (not in its checkpoints), and an adapter to start from."""
        adapter_path = self._parts.settings[PeftConfig].peft_load
        if self._config.load is None:
            raise ConfigError("--peft-method tunes beside a model", fix="give --load, the directory of its run")
        base = open_checkpoint(Path(self._config.load))
        self._require_own_model(base)
        load_tensors(base, self._base, padded_rows(self._base, self._parts.true_rows), self._group)
        if adapter_path is not None:
            adapter = open_checkpoint(Path(adapter_path))
            added = {name: tensor for name, tensor in self._tensors.items() if name.startswith(MODEL)}
            require_tensors(adapter, added, self._true_rows)
            load_tensors(adapter, added, self._true_rows, self._group)

    def _take_decoder(self, source: Checkpoint) -> None:
        """Every parameter that the GPT has; `assembly.retrofitting` has checked that it has the whole decoder."""
        known = {name: tensor for name, tensor in self._tensors.items() if name in source.index.sizes}
        decoder = {name: tensor for name, tensor in known.items() if name.startswith(MODEL)}
        load_tensors(source, decoder, self._true_rows, self._group)

    def _newest(self, run: Path) -> Path | None:
        found = [complete_checkpoints(run)[-1:]] if self._rank == 0 else [None]
        dist.broadcast_object_list(found, src=dist.get_global_rank(self._group, 0), group=self._group)
        return found[0][0] if found[0] else None

    def roll_back(self) -> bool:
        """Return to the newest checkpoint of this run; False when there is none."""
        self.finish()
        newest = self._newest(self.run) if self.run is not None else None
        if newest is None:
            return False
        self._restore(open_checkpoint(newest), EVERYTHING)
        return True

    def _taken_from_load(self) -> Taken:
        config = self._config
        if config.finetune:
            return Taken(optimizer=False, random=False, position=False)
        return Taken(optimizer=not config.no_load_optim, random=not config.no_load_rng)

    def _restore(self, checkpoint: Checkpoint, taken: Taken) -> None:
        self._require_own_model(checkpoint)
        wanted = {name: tensor for name, tensor in self._tensors.items() if name.startswith(MODEL) or taken.optimizer}
        require_tensors(checkpoint, wanted, self._true_rows)
        states = random_tensors(self._rank, random_states())
        kept = {name: state for name, state in states.items() if taken.random and _fits(checkpoint, name, state)}
        load_tensors(checkpoint, {**wanted, **kept}, self._true_rows, self._group)
        if taken.optimizer:
            self._parts.optimizer.load_state(checkpoint.state["optimizer"])
        if taken.position:
            self._state.load_json(checkpoint.state["training"])
            self._parts.loader.load_state(checkpoint.state["loader"])
        if kept:
            restore_random_states({name.rsplit(".", 1)[1]: state for name, state in kept.items()})
        elif taken.random:
            seed_everything(derived_seed(checkpoint.step, "resumed", self._rank))

    def _require_own_model(self, checkpoint: Checkpoint) -> None:
        values = self._parts.settings.values()
        sections = [section_name(section) for section in MODEL_SECTIONS]
        require_same_model(checkpoint, {name: values[name] for name in sections}, FREE_MODEL_SETTINGS)


def _fits(checkpoint: Checkpoint, name: str, state: Tensor) -> bool:
    return list(checkpoint.index.sizes.get(name, ())) == list(state.size())
