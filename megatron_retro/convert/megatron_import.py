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
from megatron_retro.convert.checkpoint_files import VOCABULARY_ROWS, parameter_shapes, write_checkpoint
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


def import_megatron(
    source: Path,
    run: Path,
    tokenizer: TokenizerConfig | None,
    say: Callable[[str], None],
    known_neutral: Collection[str] = (),
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write step 0 of `run`, and say what was skipped. Without `vocab_size` the padding of the tables stays.

    Such a checkpoint has no tokenizer inside: without one the model is refused, bytes have to be asked for.
    """
    theirs = _opened(iteration_folder(source), known_neutral)
    tokenizer = _require_tokenizer(theirs, tokenizer)
    model, retro = _with_vocabulary(theirs, vocab_size), theirs.retro
    stored_shapes = parameter_shapes(theirs.model, retro)
    _require_whole(theirs, stored_shapes)
    shapes = parameter_shapes(model, retro)

    def load(name: str) -> Tensor:
        tensor = theirs.read(name)
        if tensor.numel() != torch.Size(stored_shapes[name]).numel():
            raise ArtifactError(
                f"{theirs.path}: {theirs.sources[name]} has another shape than its arguments say",
                got=tuple(tensor.shape),
                expected=stored_shapes[name],
            )
        tensor = tensor.to(torch.float32).reshape(stored_shapes[name])
        return tensor[: model.vocab_size] if name in VOCABULARY_ROWS else tensor

    settings = Settings([model, retro, keep_text_files(tokenizer, run)])
    written = write_checkpoint(run, settings, shapes, load, theirs.fingerprint, dtype)
    say(f"{len(shapes)} parameters; skipped: {theirs.skipped}")
    _say_what_matters(theirs, vocab_size, say)
    if theirs.arguments.get("tokenizer_type") == _PIECES and tokenizer.tokenizer_type in (_PIECES, f"GPT{_PIECES}"):
        say(f"warning: documents of the run's {_PIECES} end beyond the model's ids: here that is Megatron{_PIECES}")
    return written


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
    if "optimizer" in theirs.skipped:
        say("the optimizer's state stays behind: go on with --finetune, or retrofit, which begin with a fresh one")
    if theirs.retro.retro_core_checkpoint:
        say(f"warning: {_CORE_RETRO}")
