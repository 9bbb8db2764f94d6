"""A GPT checkpoint of Megatron core (`torch_dist`) as one of ours: names and settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.convert.distributed_checkpoint import INDEX, DistributedTensors, layer_names
from megatron_retro.convert.megatron_files import read_common
from megatron_retro.convert.megatron_settings import (
    Arguments,
    common_problems,
    decoder_settings,
    require_representable,
)
from megatron_retro.errors import ArtifactError

_LAYERS = "decoder.layers."
_EMBEDDING = "embedding.word_embeddings.weight"
_NOT_OF_THE_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")


@dataclass(frozen=True)
class CoreCheckpoint:
    """Arguments of the run and tensors of its model, by the names of single layers."""

    path: Path
    arguments: Mapping[str, Any]
    tensors: DistributedTensors
    names: Mapping[str, tuple[str, int | None]]
    others: int

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.tensors.read(*self.names[name])


def read_core(folder: Path) -> CoreCheckpoint:
    """The checkpoint in a folder of one iteration."""
    common = read_common(folder)
    tensors = DistributedTensors(folder)
    shapes = {name: shape for name, shape in tensors.shapes.items() if not name.startswith(_NOT_OF_THE_MODEL)}
    names = layer_names(shapes, _LAYERS)
    others = len(tensors.shapes) - len(shapes) + len(tensors.others)
    return CoreCheckpoint(folder, vars(common["args"]), tensors, names, others)


def core_settings(arguments: Mapping[str, Any], vocabulary: int, known_neutral: Collection[str] = ()) -> ModelConfig:
    """Our settings from the run's arguments."""
    given = Arguments(arguments)
    require_representable(arguments, _problems(given), known_neutral)
    return decoder_settings(given, vocabulary, legacy=False)


def _problems(given: Arguments) -> Iterator[str]:
    yield from common_problems(given)
    if given("retro_add_retriever", False):
        yield "retro_add_retriever = True in core, whose neighbour encoder adds up normed states (expected a GPT)"
    if given("openai_gelu", False):
        yield "openai_gelu = True, which core does not follow (expected False)"


def import_core(folder: Path, run: Path, say: Callable[[str], None], known_neutral: Collection[str] = ()) -> Path:
    """Write step 0 of `run`. The vocabulary is the checkpoint's, padding included."""
    checkpoint = read_core(folder)
    if _EMBEDDING not in checkpoint.names:
        raise ArtifactError(f"{folder} is no GPT of Megatron core", expected=_EMBEDDING)
    model = core_settings(checkpoint.arguments, checkpoint.tensors.shapes[_EMBEDDING][0], known_neutral)
    retro = RetroConfig()
    shapes = parameter_shapes(model, retro)
    theirs = {name: _source(name) for name in shapes}
    problems = [f"{theirs[name]} is missing" for name in shapes if theirs[name] not in checkpoint.names]
    problems += [f"{name} is not understood" for name in checkpoint.names if name not in set(theirs.values())]
    if problems:
        raise ArtifactError(f"{folder} is not the model that its arguments describe", got="; ".join(problems[:6]))

    def load(name: str) -> Tensor:
        tensor = checkpoint.read(theirs[name])
        if tensor.numel() != torch.Size(shapes[name]).numel():
            raise ArtifactError(
                f"{folder}: {theirs[name]} has another shape than its arguments say",
                got=tuple(tensor.shape),
                expected=shapes[name],
            )
        return tensor.to(torch.float32).reshape(shapes[name])

    settings = Settings([model, retro, TokenizerConfig()])
    written = write_checkpoint(run, settings, shapes, load, {INDEX: file_record(folder / INDEX).sha256})
    say(f"{len(shapes)} parameters; skipped: {checkpoint.others} entries of the optimizer, random states and the like")
    say("no tokenizer is in such a checkpoint: give --tokenizer-type and --tokenizer-model when you use it")
    return written


# a part of a parameter's name, ours and core's; the norms lie in the linear layer that follows them
_PARTS = (
    ("attention.query_key_value.", "self_attention.linear_qkv."),
    ("attention.output.", "self_attention.linear_proj."),
    ("attention.query_norm.", "self_attention.q_layernorm."),
    ("attention.key_norm.", "self_attention.k_layernorm."),
    ("input_norm.", "self_attention.linear_qkv.layer_norm_"),
    ("mlp_norm.", "mlp.linear_fc1.layer_norm_"),
    ("mlp.up.", "mlp.linear_fc1."),
    ("mlp.down.", "mlp.linear_fc2."),
)
_WHOLE = {
    "embedding.word.weight": _EMBEDDING,
    "embedding.position.weight": "embedding.position_embeddings.weight",
    "output.weight": "output_layer.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "final_norm.bias": "decoder.final_layernorm.bias",
}


def _source(ours: str) -> str:
    """Core's name of one of our parameters. Rows lie in the same order; ours are seen in more dimensions."""
    if ours in _WHOLE:
        return _WHOLE[ours]
    _, number, rest = ours.split(".", 2)
    mine, other = next(pair for pair in _PARTS if rest.startswith(pair[0]))
    return f"{_LAYERS}{number}.{other}{rest.removeprefix(mine)}"
