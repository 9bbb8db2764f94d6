"""What the model's own code holds, computes and sends: a few layers, cut as they would be, run without memory or peers.

The model that stands in for the whole has two plain and two retrieval layers, an encoder, an embedding and a head. The
trainer's own code builds, cuts, freezes and tunes it, and makes it recompute. So the numbers follow the code: an
operator that keeps less for the backward, a cut that sends less, or a weight that is frozen, changes them without a
word here. Layers of a kind are alike, which `tests/planning/test_ranks.py` holds to traces of whole stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_retro.assembly.stage_building import compute_dtype, stage_on_meta, trained_parts
from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, TrainingConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.ops.local_tensors import local
from megatron_retro.parallel.data_parallel import fsdp_units
from megatron_retro.parallel.partition import StagePart, stage_parts
from megatron_retro.parallel.sequence_parts import NUM_SPANS
from megatron_retro.planning.fake_device import GPU, fake_rank, without_memory
from megatron_retro.planning.recorder import PartTrace, Recorder, size

EMBEDDING, POSITIONS, LAYER, FIRST, AFTER, RETRIEVAL, ENCODER, NEIGHBORS, HEAD = (
    "embedding",
    "learned positions",
    "layer",
    "first retrieval layer",
    "layer after the first retrieval layer",
    "retrieval layer",
    "encoder",
    "encoded neighbours",
    "head",
)
LAYERS = (LAYER, FIRST, AFTER, RETRIEVAL)
MakeRecorder = Callable[[Iterable[Tensor], ProcessGroup | None], Recorder]


@dataclass(frozen=True)
class Trace:
    """Every part by name; the bytes of a rank's hidden state and of the encoded neighbours that layers read (whole)."""

    parts: dict[str, PartTrace]
    hidden_bytes: float
    encoded_bytes: float

    def part(self, name: str) -> PartTrace:
        """Nothing for a part that does not run (the encoder behind a shut gate)."""
        return self.parts.get(name, PartTrace())

    def times(self, number: float) -> Trace:
        """With so many times the samples in a microbatch."""
        parts = {name: part.times(number) for name, part in self.parts.items()}
        return Trace(parts, self.hidden_bytes * number, self.encoded_bytes * number)


@dataclass(frozen=True)
class StageTraces:
    """What the first stage's parts are made of, and those of later ones."""

    first: Trace
    later: Trace

    def of(self, part: StagePart) -> Trace:
        """The one that tells of a stage."""
        return self.first if part.first else self.later

    def times(self, number: float) -> StageTraces:
        """With so many times the samples in a microbatch."""
        return StageTraces(self.first.times(number), self.later.times(number))


def trace_stages(settings: Settings, device: torch.device = GPU) -> StageTraces:
    """Both kinds of stage. They differ where decoder layers are frozen: a later stage's input always gets a gradient.

    Where something is tuned inside every decoder layer, all but the first have such an input.
    """
    trained = trained_parts(settings)
    if trained.decoder:
        only = trace_parts(settings, device, behind_border=not trained.weights)
        return StageTraces(only, only)
    first = trace_parts(settings, device)
    pipelined = settings[ParallelConfig].pipeline_model_parallel_size > 1
    return StageTraces(first, trace_parts(settings, device, behind_border=True) if pipelined else first)


def trace_parts(
    settings: Settings,
    device: torch.device = GPU,
    *,
    behind_border: bool = False,
    evaluating: bool = False,
    make_recorder: MakeRecorder = Recorder,
) -> Trace:
    """Forward and backward of the model that stands in for the whole, on the first of the ranks that share a sequence
    and its layers; the others do as much.

    With `behind_border` the input of its layers gets a gradient, whatever trains. With `evaluating` there is a forward
    alone, and the working bytes of a part are all that is there beside the weights.
    """
    retrieves, states = settings[RetroConfig].retro_add_retriever, _states_read(settings)
    settings = settings.replace(
        num_layers=4 if retrieves else 1,
        retro_layers=(2, 4) if retrieves else None,
        retro_init="noise",  # whose heads and depth are the whole model's
        retro_open_heads=None,
        pipeline_model_parallel_size=1,
        num_layers_per_virtual_pipeline_stage=None,
        pipeline_layout=None,
    )
    parallel = settings[ParallelConfig]
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    with fake_rank(0, ranks, parallel) as mesh:
        (part,) = stage_parts(settings, settings[DataConfig].seq_length)
        model = stage_on_meta(settings, part, mesh).model
        shapes = local_shapes(model)
        with without_memory(device):
            hold_plainly(model, shapes, device, compute_dtype(settings[OptimizerConfig]))
            if behind_border and model.embedding is not None:
                model.embedding.register_forward_hook(lambda module, arguments, hidden: hidden.requires_grad_())
            found = _run(model, settings, device, evaluating, make_recorder, mesh.context)
    return replace(found, encoded_bytes=found.encoded_bytes * states / _states_read(settings)) if retrieves else found


def _states_read(settings: Settings) -> int:
    """How many of the encoder's states go on to retrieval layers, side by side."""
    return len(set(settings[RetroConfig].encoder_depths(settings[ModelConfig].num_layers).values()))


def local_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of this rank's part of every parameter."""
    return {name: local(parameter).shape for name, parameter in model.named_parameters()}


def hold_plainly(model: nn.Module, shapes: Mapping[str, torch.Size], device: torch.device, dtype: torch.dtype) -> None:
    """Let a model hold its parts of parameters as plain tensors, in the type that it computes in."""
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        part = torch.empty(shapes[name], dtype=dtype, device=device)
        setattr(model.get_submodule(path), leaf, nn.Parameter(part, parameter.requires_grad))


def _run(
    model: Retro,
    settings: Settings,
    device: torch.device,
    evaluating: bool,
    make_recorder: MakeRecorder,
    context: ProcessGroup | None,
) -> Trace:
    shape = (settings[TrainingConfig].micro_batch_size, own_length(settings))
    tokens_BS = torch.zeros(shape, dtype=torch.long, device=device)
    neighbors = full_neighbors(settings, device)
    recorder = make_recorder(model.parameters(), context)
    passed: dict[str, int] = {}
    watch(model, recorder, passed)
    recorder.forward = not evaluating
    with recorder, torch.set_grad_enabled(not evaluating):
        losses_BS = model.train(not evaluating)(tokens_BS, neighbors, labels_BS=tokens_BS)
        if not evaluating:
            recorder.end_forward()
            losses_BS.sum().backward()
    _count_parameters(model, recorder)
    return Trace(recorder.parts, passed[LAYER], passed.get(ENCODER, 0))


def own_length(settings: Settings) -> int:
    """Tokens of a sequence on a rank."""
    return settings[DataConfig].seq_length // settings[ParallelConfig].context_parallel_size


def full_neighbors(settings: Settings, device: torch.device) -> Neighbors[Tensor] | None:
    """All neighbours of a rank's part of a microbatch, none absent."""
    retro = settings[RetroConfig]
    if not retro.retro_add_retriever:
        return None
    chunks, shared = (
        own_length(settings) // retro.retro_chunk_length,
        settings[ParallelConfig].context_parallel_size > 1,
    )
    shape = (settings[TrainingConfig].micro_batch_size, chunks, retro.retro_num_neighbors, retro.retrieved_length())
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    return Neighbors(
        torch.zeros(shape, dtype=torch.int32, device=device), mask, mask[:, :NUM_SPANS] if shared else None
    )


def watch(model: Retro, recorder: Recorder, passed: dict[str, int]) -> None:
    """Tell the recorder which part runs, forward and backward, and remember the size of what each gives."""
    for name, module in _parts(model):
        module.register_forward_pre_hook(partial(_enter, recorder, name))
        module.register_forward_hook(partial(_leave, recorder, passed, name))
    vars(model)["encode"] = partial(_encode, recorder, passed, model.encode)
    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # gradients are counted by themselves
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))


def _enter(recorder: Recorder, name: str, module: nn.Module, arguments: Any) -> None:
    if name == ENCODER:  # it runs inside of a layer, whose turn comes again
        for tensor in arguments:
            _when_its_gradient_comes(tensor, partial(recorder.turn_to, FIRST))
    recorder.stack.append(name)


def _leave(
    recorder: Recorder, passed: dict[str, int], name: str, module: nn.Module, arguments: Any, output: Any
) -> None:
    recorder.stack.pop()
    first: Tensor = output[0] if isinstance(output, tuple) else output
    passed[name] = size(first)
    _when_its_gradient_comes(first, partial(recorder.turn_to, name))


def _encode(recorder: Recorder, passed: dict[str, int], plain: Callable[..., Tensor], *arguments: Any) -> Tensor:
    encoded = plain(*arguments)
    passed[ENCODER] = size(encoded)
    recorder.credit(encoded, NEIGHBORS)
    return encoded


def _when_its_gradient_comes(tensor: Any, act: Callable[[], None]) -> None:
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        tensor.register_hook(lambda gradient: act())  # type: ignore[no-untyped-call]


def layer_kinds(retro: RetroConfig, num_layers: int) -> list[str]:
    """The kind of every decoder layer, in order."""
    retrieval = [number - 1 for number in retro.retrieval_layers(num_layers)]
    first = min(retrieval, default=num_layers)
    return [
        FIRST if layer == first else RETRIEVAL if layer in retrieval else AFTER if layer > first else LAYER
        for layer in range(num_layers)
    ]


def _parts(model: Retro) -> Iterator[tuple[str, nn.Module]]:
    kinds = layer_kinds(model.retro, model.model.num_layers)
    for name, module in (
        (EMBEDDING, model.embedding),
        *((kinds[int(index)], layer) for index, layer in model.layers.items()),
        (ENCODER, model.encoder),
        (HEAD, model.final_norm),
        (HEAD, model.output),
    ):
        if module is not None:
            yield name, module


def _count_parameters(model: Retro, recorder: Recorder) -> None:
    unit_ids = {id(unit) for unit in fsdp_units(model)}
    positions = None if model.embedding is None else model.embedding.position
    modules = [*_parts(model), *([] if positions is None else [(POSITIONS, positions)])]
    for name, module in modules:
        part = recorder.part(name)
        own = [each for each in module.parameters() if name == POSITIONS or not _belongs_to(each, positions)]
        sizes = [sum(map(Tensor.numel, each.parameters())) for each in module.modules() if id(each) in unit_ids]
        part.parameters += sum(map(Tensor.numel, own))
        part.trained_parameters += sum(each.numel() for each in own if each.requires_grad)
        part.largest_unit = max([part.largest_unit, *sizes])
        part.loose_parameters += sum(map(Tensor.numel, own)) - sum(sizes)


def _belongs_to(parameter: nn.Parameter, module: nn.Module | None) -> bool:
    return module is not None and any(parameter is each for each in module.parameters())
