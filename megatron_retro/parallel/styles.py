"""Cuts a plain model over the tensor ranks, by the table of cuts. The model's code does not change.

Parameters become DTensors (leaves compute on their local part); regions get hooks that gather and reduce; embedding and
output compute on their rows of the vocabulary. Parameters may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_retro.model.leaves import Embedding, HeadsToHidden, Linear, Output
from megatron_retro.model.retro import Retro
from megatron_retro.ops.local_tensors import local
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.cuts import CUTS, Cut, Region, cut_of, regions_of
from megatron_retro.parallel.layer_transforms import replace_forward
from megatron_retro.parallel.vocabulary import gathered_logits, parallel_losses, partial_embedding, true_rows


def cut_model(model: Retro, mesh: DeviceMesh, axis: TensorAxis, cuts: Sequence[Cut] = CUTS) -> None:
    """Cut every parameter and every exchange of a model, or of the part of it that a stage holds."""
    for name, parameter in list(model.named_parameters()):
        _replace_parameter(model, name, _as_dtensor(parameter, placement_of(cut_of(name, cuts), parameter.dim()), mesh))
    modules = dict(model.named_modules())
    for path, region in regions_of(modules).items():
        _open_region(modules[path], region, axis)
    for table in (model.embedding, model.encoder.embedding if model.encoder is not None else None):
        if table is not None:
            _cut_embedding(table.word, axis)
            if table.position is not None:
                table.position.register_forward_hook(partial(_own_positions, axis))
    if model.output is not None:
        replace_forward(model.output, partial(_parallel_output, model.output, axis))
    if model.encoder is not None:
        model.encoder.register_forward_hook(lambda module, arguments, encoded: axis.gather(encoded))
    for layer in model.layers.values():
        layer.register_forward_pre_hook(partial(_gather_for_reader, axis), with_kwargs=True)


def placement_of(cut: Cut, num_dims: int) -> Placement:
    """Where a cut puts a tensor of so many dimensions."""
    return Replicate() if cut.dim is None else Shard(cut.dim % num_dims)


def partial_parameters(
    model: nn.Module, sequence_parallel: bool, cuts: Sequence[Cut] = CUTS
) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are whole on every tensor rank while their gradients are parts of a sum."""
    for name, parameter in model.named_parameters():
        if cut_of(name, cuts).partial_gradient(sequence_parallel):
            yield name, parameter


@torch.no_grad()
def sum_partial_gradients(model: nn.Module, axis: TensorAxis, cuts: Sequence[Cut] = CUTS) -> None:
    """Complete the gradients of whole parameters, in one collective for each type; every tensor rank calls it."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for _, parameter in partial_parameters(model, axis.sequence_parallel, cuts):
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            by_type.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_type.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=axis.group)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, torch.split(flat, sizes), strict=True):
            gradient.copy_(total.view_as(gradient))


def _as_dtensor(parameter: nn.Parameter, placement: Placement, mesh: DeviceMesh) -> nn.Parameter:
    part = parameter.data
    if isinstance(placement, Shard):
        part = part.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
    shared = DTensor.from_local(
        part, mesh, (placement,), run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(shared, requires_grad=parameter.requires_grad)


def _replace_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def _open_region(module: nn.Module, region: Region, axis: TensorAxis) -> None:
    """Gather the first argument; reduce the result, and add the closing bias once, after the sum."""
    closing = module.get_submodule(region.closing)
    assert isinstance(closing, Linear)
    replace_forward(closing, partial(_product, closing))
    module.register_forward_pre_hook(lambda _, arguments: (axis.gather(arguments[0]), *arguments[1:]))

    def reduce(_: nn.Module, arguments: Any, result: Tensor) -> Tensor:
        residual = axis.reduce(result)
        return residual if closing.bias is None else residual + local(closing.bias)

    module.register_forward_hook(reduce)


def _product(linear: Linear, hidden: Tensor) -> Tensor:
    """A row-parallel product without its bias: this rank's part of the sum."""
    if isinstance(linear, HeadsToHidden):
        hidden = hidden.flatten(-2)
    return linear.multiply(hidden, local(linear.weight), None)


def _cut_embedding(word: Embedding, axis: TensorAxis) -> None:
    def forward(ids: Tensor) -> Tensor:
        rows = local(word.weight)
        return axis.reduce(partial_embedding(ids, rows, axis.rank * rows.shape[0]))

    replace_forward(word, forward)


def _own_positions(axis: TensorAxis, module: nn.Module, arguments: Any, vectors: Tensor) -> Tensor:
    """Learned positions of this rank's part of the sequence."""
    if not axis.sequence_parallel:
        return vectors
    length = axis.local_length(vectors.shape[-2])
    return vectors.narrow(-2, axis.rank * length, length)


def cut_prompt(model: Retro, axis: TensorAxis) -> None:
    """Virtual tokens, where there are any, on this rank's part of the sequence."""
    prompt = None if model.embedding is None else getattr(model.embedding, "prompt", None)
    if prompt is not None and axis.sequence_parallel:

        def own_part(tokens: Tensor) -> Tensor:
            length = axis.local_length(tokens.shape[-1])
            return tokens.narrow(-1, axis.rank * length, length)

        prompt.own_part = own_part


def _gather_for_reader(axis: TensorAxis, module: nn.Module, arguments: Any, keywords: Any) -> Any:
    """The first retrieval layer hands its state to the encoder, which reads whole chunks."""
    read = arguments[3] if len(arguments) > 3 else keywords.get("read")
    if read is None:
        return None

    def gathering(normed: Tensor) -> Tensor | None:
        encoded: Tensor | None = read(axis.gather(normed))
        return encoded

    if len(arguments) > 3:
        return (*arguments[:3], gathering, *arguments[4:]), keywords
    return arguments, {**keywords, "read": gathering}


def _parallel_output(
    output: Output, axis: TensorAxis, hidden: Tensor, labels: Tensor | None = None, tied: Embedding | None = None
) -> Tensor:
    table = output.weight if output.weight is not None else tied.weight if tied is not None else None
    if table is None:
        raise ValueError("a tied output needs the embedding")
    rows = local(table)
    first_row = axis.rank * rows.shape[0]
    gathered = axis.gather(hidden)
    if labels is None:
        return gathered_logits(gathered, rows, output.vocab_size, axis.group)
    return parallel_losses(gathered, true_rows(rows, first_row, output.vocab_size), labels, first_row, axis.group)
