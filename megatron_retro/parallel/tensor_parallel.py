"""Tensor parallelism: cuts a plain model over the tensor ranks, by the table of cuts. The model's code does not change.

Parameters become DTensors (leaves compute on their local part); regions get hooks that gather and reduce. Parameters
may be on the meta device.

Embedding and output compute on their rows of the vocabulary: rank i holds rows [i*L, (i+1)*L) of the padded table. Rows
at or beyond the true vocabulary take no part anywhere, and a rank may hold such rows only. Logits are never gathered
for the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn import functional

from megatron_retro.model.attention import EncoderCrossAttention
from megatron_retro.model.gates import AdaptiveGate
from megatron_retro.model.leaves import Embedding, HeadsNorm, HeadsToHidden, Linear, Output
from megatron_retro.model.retro import Retro
from megatron_retro.ops.linear import linear
from megatron_retro.ops.linear_cross_entropy import gradients, statistics
from megatron_retro.ops.local_tensors import local
from megatron_retro.parallel.collectives import SEQUENCE_DIM, StreamCut, TensorAxis, all_gather
from megatron_retro.parallel.cuts import CUTS, Cut, Region, cut_of, regions_of
from megatron_retro.parallel.layer_transforms import replace_forward
from megatron_retro.parallel.region_products import GatheredProduct, ReducedProduct


def cut_model(
    model: Retro, mesh: DeviceMesh, axis: TensorAxis, cuts: Sequence[Cut] = CUTS, *, overlaps: bool = True
) -> None:
    """Cut every parameter and every exchange of a model, or of the part of it that a stage holds.

    `overlaps`: products that border on a region go together with its collectives (`region_products`).
    """
    for name, parameter in list(model.named_parameters()):
        _replace_parameter(model, name, _as_dtensor(parameter, placement_of(cut_of(name, cuts), parameter.dim()), mesh))
    modules = dict(model.named_modules())
    stream, neighbors = StreamCut(), StreamCut()
    for path, region in regions_of(modules).items():
        _open_region(modules[path], region, axis, neighbors if path.startswith("encoder.") else stream, overlaps)
    for table in (model.embedding, model.encoder.embedding if model.encoder is not None else None):
        if table is not None:
            _cut_embedding(table.word, axis, neighbors)
            if table.position is not None:
                table.position.register_forward_hook(partial(_own_positions, axis, neighbors))
    for module in modules.values():
        if isinstance(module, HeadsNorm):
            replace_forward(module, partial(_norm_of_cut_heads, module, axis))
    if model.output is not None:
        replace_forward(model.output, partial(_parallel_output, model.output, axis))
    if model.encoder is not None:
        model.encoder.register_forward_hook(lambda module, arguments, encoded: axis.gather(encoded, neighbors.dim))
    for layer in model.layers.values():
        layer.register_forward_pre_hook(partial(_gather_for_encoder, axis), with_kwargs=True)


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
    for partial_sums in by_type.values():
        flat = torch.cat([gradient.flatten() for gradient in partial_sums])
        dist.all_reduce(flat, group=axis.group)
        sizes = [gradient.numel() for gradient in partial_sums]
        for gradient, total in zip(partial_sums, torch.split(flat, sizes), strict=True):
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


def _open_region(module: nn.Module, region: Region, axis: TensorAxis, cut: StreamCut, overlaps: bool) -> None:
    """Gather the first argument; reduce the result, and add the closing bias once, after the sum."""
    opening, closing = module.get_submodule(region.opening), module.get_submodule(region.closing)
    assert isinstance(opening, Linear) and isinstance(closing, Linear)
    replace_forward(closing, partial(_product, closing))
    products = None
    if overlaps and _meets_nothing_else(module, opening, closing):
        by_chunks = isinstance(module, EncoderCrossAttention)
        products = GatheredProduct(axis, cut, by_chunks=by_chunks)
        opening.multiply, closing.multiply = products, ReducedProduct(axis, cut, by_chunks=by_chunks)

    def gather(_: nn.Module, arguments: Any) -> Any:
        if products is not None and products.acts():
            return arguments
        return axis.gather(arguments[0], cut.dim), *arguments[1:]

    def reduce(_: nn.Module, arguments: Any, result: Tensor) -> Tensor:
        acted = products is not None and products.acts()
        residual = result if acted else axis.reduce(result, cut.dim)
        return residual if closing.bias is None else residual + local(closing.bias)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(reduce)


def _meets_nothing_else(module: nn.Module, opening: Linear, closing: Linear) -> bool:
    """Whether two products alone see a region's borders: no gate that reads tokens, and nothing tuned beside them."""
    gate, attending = getattr(module, "gate", None), getattr(module, "attending", None)
    beside = [*opening.children(), *closing.children()]
    return not beside and attending is None and not isinstance(gate, AdaptiveGate)


def _product(linear: Linear, hidden: Tensor) -> Tensor:
    """A row-parallel product without its bias: this rank's part of the sum."""
    if isinstance(linear, HeadsToHidden):
        hidden = hidden.flatten(-2)
    return linear.multiply(hidden, local(linear.weight), None)


def _norm_of_cut_heads(norm: HeadsNorm, axis: TensorAxis, heads_BSND: Tensor) -> Tensor:
    """Each rank norms its own heads by the mean square of all."""
    wide_BSND = heads_BSND.to(torch.promote_types(heads_BSND.dtype, torch.float32))
    squares_BS1 = wide_BSND.square().sum((-2, -1))[..., None]
    scale_BS1 = torch.rsqrt(axis.total(squares_BS1) / norm.width + norm.epsilon)
    weight_ND = local(norm.heads) + 1 if norm.weight_plus_one else local(norm.heads)
    return (wide_BSND * scale_BS1[..., None] * weight_ND).to(heads_BSND.dtype)


def _cut_embedding(word: Embedding, axis: TensorAxis, neighbors: StreamCut) -> None:
    """Neighbours [X, K, R] are cut by whole chunks where these divide: collectives then copy nothing."""

    def forward(ids: Tensor) -> Tensor:
        rows, dim = local(word.weight), SEQUENCE_DIM
        if ids.dim() == 3:
            dim = neighbors.dim = 0 if len(ids) % axis.size == 0 else SEQUENCE_DIM
        return word.scaled(axis.reduce(partial_embedding(ids, rows, axis.rank * rows.shape[0]), dim))

    replace_forward(word, forward)


def _own_positions(
    axis: TensorAxis, neighbors: StreamCut, module: nn.Module, arguments: Any, vectors: Tensor
) -> Tensor:
    """Learned positions [B, S, H] of this rank's part of the sequence, or [R, H] of its part of each neighbour."""
    if not axis.sequence_parallel or (vectors.dim() == 2 and neighbors.dim == 0):
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


def _gather_for_encoder(axis: TensorAxis, module: nn.Module, arguments: Any, keywords: Any) -> Any:
    """The first retrieval layer hands its state to the encoder, which reads whole chunks."""
    encode = arguments[3] if len(arguments) > 3 else keywords.get("encode")
    if encode is None:
        return None

    def gathering(normed: Tensor) -> Tensor | None:
        encoded: Tensor | None = encode(axis.gather(normed))
        return encoded

    if len(arguments) > 3:
        return (*arguments[:3], gathering, *arguments[4:]), keywords
    return arguments, {**keywords, "encode": gathering}


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


def partial_embedding(ids: Tensor, rows_LH: Tensor, first_row: int) -> Tensor:
    """[..., H]: this rank's rows for the ids that it holds, zero for others; the sum over ranks is the embedding."""
    local_ids = ids - first_row
    held = (local_ids >= 0) & (local_ids < rows_LH.shape[0])
    vectors = functional.embedding(local_ids.where(held, 0), rows_LH)
    return vectors * held[..., None].to(vectors.dtype)


def true_rows(rows_LH: Tensor, first_row: int, vocab_size: int) -> Tensor:
    """This rank's rows less the padding; where there is none the rows themselves, whose gradient is not copied."""
    count = max(0, min(rows_LH.shape[0], vocab_size - first_row))
    return rows_LH if count == rows_LH.shape[0] else rows_LH[:count]


def gathered_logits(hidden_BSH: Tensor, rows_LH: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """[B, S, V] of the true vocabulary on every rank; for evaluation, without gradients."""
    return all_gather(linear(hidden_BSH, rows_LH), -1, group)[..., :vocab_size]


def parallel_losses(
    hidden_BSH: Tensor, rows_LH: Tensor, labels_BS: Tensor, first_row: int, group: dist.ProcessGroup
) -> Tensor:
    """[B, S] float32: -log softmax over all ranks' rows; two small collectives for all tokens together.

    A label below zero marks a position that does not count. `hidden` is gathered (its gradient is this rank's part);
    every rank of the group must call.
    """
    arguments = (hidden_BSH.flatten(0, -2), rows_LH, labels_BS.flatten(), first_row, group)
    losses: Tensor = _ParallelLosses.apply(*arguments)  # type: ignore[no-untyped-call]
    return losses.view(labels_BS.shape)


class _ParallelLosses(torch.autograd.Function):
    """Logits exist for a block of the vocabulary at a time, in the forward and again in the backward."""

    @staticmethod
    def forward(
        context: Any, hidden_TH: Tensor, rows_LH: Tensor, labels_T: Tensor, first_row: int, group: dist.ProcessGroup
    ) -> Tensor:
        own = statistics(hidden_TH, rows_LH, labels_T, first_row)
        largest_T = own.largest_T.clone()
        dist.all_reduce(largest_T, dist.ReduceOp.MAX, group=group)
        sums_2T = torch.stack((own.sum_T * (own.largest_T - largest_T).exp(), own.label_logit_T))
        dist.all_reduce(sums_2T, group=group)
        context.first_row = first_row
        context.save_for_backward(hidden_TH, rows_LH, labels_T, largest_T + sums_2T[0].log())
        # in this order large logits cancel before the small logarithm is added
        losses_T = sums_2T[0].log() + (largest_T - sums_2T[1])
        return losses_T.where(labels_T >= 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, rows_LH, labels_T, log_normalizer_T = context.saved_tensors
        scale_T = gradient_T.float().where(labels_T >= 0, 0.0).contiguous()
        wanted = context.needs_input_grad[:2]
        found = gradients(hidden_TH, rows_LH, labels_T, log_normalizer_T, scale_T, context.first_row, wanted=wanted)
        return *found, None, None, None
