"""A GPT or Retro of Megatron-LM's, of its older code or of core, in either of its formats, as a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.begun_run import BegunRun
from megatron_retro.convert.checkpoint_files import VOCABULARY_ROWS, parameter_shapes, write_checkpoint
from megatron_retro.convert.megatron_adam import MASTER, NONE, progress_of
from megatron_retro.convert.megatron_checkpoint import legacy_model
from megatron_retro.convert.megatron_core import core_model, is_core, read_distributed, read_shards
from megatron_retro.convert.megatron_files import is_distributed, iteration_folder, read_megatron
from megatron_retro.convert.megatron_model import MegatronModel
from megatron_retro.data.model_text import FILE_SETTINGS, keep_text_files
from megatron_retro.errors import ArtifactError

_CORE_RETRO = (
    "a Retro of Megatron core is another function than those of its older code and ours: no norm before the output, "
    "layer 1 of the encoder adds to its normed state, cross-attention has biases and neighbours have the learned "
    "positions, where the model has any. It is marked retro_core_checkpoint and stays that function"
)

_PIECES = "SentencePieceTokenizer"
_COME_ALONG = ("optimizer", "schedule", "opt_param_scheduler", "iteration")
# arguments that a run goes on with, for a checkpoint of ours has no rates
_RATES = (
    *("lr", "min_lr", "lr_decay_style", "lr_warmup_samples", "lr_warmup_iters", "lr_decay_samples", "lr_decay_iters"),
    *("train_samples", "train_iters", "global_batch_size", "seq_length"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
)


def import_megatron(
    source: Path,
    run: Path,
    tokenizer: TokenizerConfig | None,
    say: Callable[[str], None],
    known_neutral: Collection[str] = (),
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "auto",
) -> Path:
    """Write a checkpoint of `run`, and say what was skipped. Without `vocab_size` the padding of the tables stays.

    It is that of the run's iteration, where the optimizer's state comes along, else step 0: weights only. A checkpoint
    of Megatron's has no tokenizer inside: without one the model is refused, bytes have to be asked for.
    """
    theirs = _opened(iteration_folder(source), known_neutral)
    tokenizer = _require_tokenizer(theirs, tokenizer)
    model, retro = _with_vocabulary(theirs, vocab_size), theirs.retro
    stored_shapes = parameter_shapes(theirs.model, retro)
    _require_whole(theirs, stored_shapes)
    shapes = parameter_shapes(model, retro)

    def fitted(name: str, tensor: Tensor) -> Tensor:
        if tensor.numel() != torch.Size(stored_shapes[name]).numel():
            raise ArtifactError(
                f"{theirs.path}: {theirs.sources[name]} has another shape than its arguments say",
                got=tuple(tensor.shape),
                expected=stored_shapes[name],
            )
        tensor = tensor.to(torch.float32).reshape(stored_shapes[name])
        return tensor[: model.vocab_size] if name in VOCABULARY_ROWS else tensor

    progress = _progress(theirs, optimizer, dtype, fitted)
    masters = theirs.adam.tensors.get(MASTER, {}) if isinstance(progress, BegunRun) else {}

    def load(name: str) -> Tensor:
        return fitted(name, masters[name]() if name in masters else theirs.read(name))

    settings = Settings([model, retro, keep_text_files(tokenizer, run)])
    goes_on = progress if isinstance(progress, BegunRun) else None
    written = write_checkpoint(run, settings, shapes, load, theirs.fingerprint, dtype, goes_on)
    skipped = [name for name in theirs.skipped if goes_on is None or name not in _COME_ALONG]
    merged = f"; merged: {theirs.tensor_ranks} tensor ranks" if theirs.tensor_ranks > 1 else ""
    say(f"{len(shapes)} parameters; skipped: {', '.join(skipped) or 'nothing'}{merged}")
    if progress != NONE.problem:
        say(_said_of(progress, theirs))
    _say_what_matters(theirs, vocab_size, say)
    if theirs.arguments.get("tokenizer_type") == _PIECES and tokenizer.tokenizer_type in (_PIECES, f"GPT{_PIECES}"):
        say(f"warning: documents of the run's {_PIECES} end beyond the model's ids: here that is Megatron{_PIECES}")
    return written


def _progress(
    theirs: MegatronModel, wanted: str, dtype: torch.dtype, fitted: Callable[[str, Tensor], Tensor]
) -> BegunRun | str:
    """Where the run stood, with its moments in our shapes; or why they stay behind."""
    if wanted == "none":
        return "--convert-optimizer none"
    found = progress_of(theirs.adam, theirs.arguments)
    if dtype != torch.float32:
        found = "it goes with weights in float32 alone: leave out --convert-dtype"
    if isinstance(found, BegunRun):
        return replace(found, moment=lambda name, moment: fitted(name, theirs.adam.tensors[moment][name]()))
    if wanted == "required":
        raise ArtifactError(
            f"{theirs.path}: the optimizer's state cannot come along",
            got=found,
            fix="without --convert-optimizer required the weights come alone",
        )
    return found


def _said_of(progress: BegunRun | str, theirs: MegatronModel) -> str:
    """One line on the optimizer's state: whether it came, and how to go on."""
    if isinstance(progress, str):
        return f"the optimizer's state stays behind: {progress}; go on with --finetune, or retrofit, which begin afresh"
    at, given = progress.training, theirs.arguments
    flags = [f"--{name.replace('_', '-')} {given[name]}" for name in _RATES if given.get(name) is not None]
    schedule = theirs.adam.content.get("opt_param_scheduler") or {}
    behind = at.samples - schedule.get("num_steps", at.samples)
    late = f" (its schedule stood {behind} samples earlier: steps that overflow count here)" if behind else ""
    return (
        f"the optimizer's state comes along: iteration {at.step}, {at.samples} samples, step {progress.adam_step} of "
        f"Adam{late}; `pretrain --load` goes on there, with the run's own {' '.join(flags) or 'flags'}"
    )


def _opened(folder: Path, known_neutral: Collection[str]) -> MegatronModel:
    if is_distributed(folder):
        return core_model(read_distributed(folder), known_neutral)
    checkpoint = read_megatron(folder)
    if is_core(checkpoint):
        return core_model(read_shards(checkpoint), known_neutral)
    return legacy_model(checkpoint, known_neutral)


def _require_tokenizer(theirs: MegatronModel, tokenizer: TokenizerConfig | None) -> TokenizerConfig:
    if tokenizer is not None:
        return tokenizer
    named = ("tokenizer_type", *FILE_SETTINGS)
    told = [f"{name} {value}" for name in named if (value := theirs.arguments.get(name)) is not None]
    raise ArtifactError(
        f"{theirs.path} holds no tokenizer",
        got=f"its run had {', '.join(told)}" if told else "a run that names none",
        expected="the one that the model was trained with",
        fix="name it: --tokenizer-type, --tokenizer-model (ByteTokenizer for a model of bytes)",
    )


def _with_vocabulary(theirs: MegatronModel, vocab_size: int | None) -> ModelConfig:
    stored = theirs.model.vocab_size or 0
    if vocab_size is not None and vocab_size > stored:
        raise ArtifactError(
            f"{theirs.path} has a smaller vocabulary than --convert-vocab-size", got=vocab_size, expected=stored
        )
    return theirs.model if vocab_size is None else replace(theirs.model, vocab_size=vocab_size)


def _require_whole(theirs: MegatronModel, shapes: Collection[str]) -> None:
    problems = [f"{theirs.sources[name]} is missing" for name in shapes if theirs.sources[name] not in theirs.names]
    used = set(theirs.sources.values())
    problems += [f"{name} is not understood" for name in sorted(theirs.names) if name not in used]
    if problems:
        raise ArtifactError(f"{theirs.path} is not the model that its arguments describe", got="; ".join(problems[:6]))


def _say_what_matters(theirs: MegatronModel, vocab_size: int | None, say: Callable[[str], None]) -> None:
    true, stored = theirs.arguments.get("vocab_size"), theirs.model.vocab_size or 0
    if vocab_size is None and true is not None and true < stored:
        say(f"{stored - true} of {stored} rows of the vocabulary fill it up: --convert-vocab-size {true} cuts them off")
    if theirs.retro.retro_core_checkpoint:
        say(f"warning: {_CORE_RETRO}")
