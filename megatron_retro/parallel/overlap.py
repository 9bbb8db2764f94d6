"""Products with a collective of the tensor ranks beside them, in the order that is written here.

Each function is one operator to a compiler, so that compiled layers have the same order as eager ones. Rows that are
gathered come in pieces: while one is multiplied, the next ones arrive; rows that are reduced go in pieces likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from megatron_retro.ops.cpu_products import is_slow, linear_product, product
from megatron_retro.ops.weight_gradients import add_product
from megatron_retro.parallel.collectives import begin_all_gather, begin_all_reduce, begin_reduce_scatter

MOST_PIECES = 4
LEAST_BYTES = 4 * 2**20  # of what a piece's collective gives: a smaller one lasts hardly longer than its start
LEAST_RESULTS = 2**22  # of a piece's product: fewer do not fill a GPU (a tile of 128 x 256 on each of 132 processors)

PutOff = Callable[[Tensor, Tensor], None] | None  # takes what a weight's gradient is computed from, where that waits
# torch leaves it untyped
_LIBRARY: Any = torch.library.Library("megatron_retro", "FRAGMENT")  # type: ignore[no-untyped-call]
OPERATORS: dict[Any, Callable[..., Any]] = {}  # to a compiler, and what each runs


def gathered_product(residual: Tensor, weight_YX: Tensor, bias_Y: Tensor | None, group: str, dim: int) -> Tensor:
    """[..., X] of this rank's part -> [..., Y] of all rows."""
    ranks = _ranks(group)
    part = residual.movedim(dim, 0).contiguous()
    gathered, works = _begin_gathers(part, _pieces(part, ranks.size(), len(weight_YX)), ranks)
    if len(works) == 1:
        works[0].wait()
        return linear_product(gathered[0], weight_YX, bias_Y).movedim(0, dim)
    products = part.new_empty(len(part) * ranks.size(), *part.shape[1:-1], len(weight_YX))
    _multiply_as_they_come(gathered, works, weight_YX.T, bias_Y, _by_piece(products, len(works), ranks.size()))
    return products.movedim(0, dim)


def gathered_product_gradients(
    gradient: Tensor,
    residual: Tensor,
    weight_YX: Tensor,
    sums_YX: Tensor | None,
    wanted: Sequence[bool],
    group: str,
    dim: int,
    sequence_parallel: bool,
    put_off: PutOff = None,
) -> tuple[Tensor, Tensor]:
    """Of the residual, reduced, and of the weight: empty what is not wanted, or goes another way."""
    ranks, hidden = _ranks(group), residual
    reduced, works = weight_YX.new_empty(0), list[dist.Work]()
    if sequence_parallel:
        gradient, residual = gradient.movedim(dim, 0).contiguous(), residual.movedim(dim, 0).contiguous()
        if wanted[1]:
            gathered, works = _begin_gathers(residual, 1, ranks)
            hidden = gathered[0]
    if wanted[0]:
        parts = product(gradient.flatten(0, -2), weight_YX).view(*gradient.shape[:-1], -1)
        reduced = torch.empty_like(residual) if sequence_parallel else parts
        begin = begin_reduce_scatter(reduced, parts, ranks) if sequence_parallel else begin_all_reduce(parts, ranks)
        works.append(begin)
    if wanted[1] and sequence_parallel:
        works.pop(0).wait()
    weight_gradient = weight_gradient_of(gradient, hidden, sums_YX, put_off) if wanted[1] else weight_YX.new_empty(0)
    for work in works:
        work.wait()
    return reduced.movedim(0, dim) if wanted[0] and sequence_parallel else reduced, weight_gradient


def reduced_product(hidden: Tensor, weight_YX: Tensor, group: str, dim: int, sequence_parallel: bool) -> Tensor:
    """[..., X] of all rows, this rank's columns -> [..., Y], summed over ranks: all rows, or this rank's part."""
    ranks = _ranks(group)
    parts = ranks.size() if sequence_parallel else 1
    rows = hidden.movedim(dim, 0).contiguous() if sequence_parallel else hidden.contiguous().flatten(0, -2)
    reduced = rows.new_empty(len(rows) // parts, *rows.shape[1:-1], len(weight_YX))
    pieces, works = _pieces(reduced, parts, len(weight_YX)), []
    for some, place in zip(_by_piece(rows, pieces, parts), reduced.chunk(pieces), strict=True):
        if sequence_parallel:
            sums = some.new_empty(*some.shape[:-1], len(weight_YX))
            _multiply_into(some, weight_YX.T, None, sums)
            works.append(begin_reduce_scatter(place, sums.view(parts * len(place), *place.shape[1:]), ranks))
        else:
            _multiply_into(some, weight_YX.T, None, place.unsqueeze(0))
            works.append(begin_all_reduce(place, ranks))
    for work in works:
        work.wait()
    return reduced.movedim(0, dim) if sequence_parallel else reduced.view(*hidden.shape[:-1], -1)


def reduced_product_gradients(
    gradient: Tensor,
    hidden: Tensor,
    weight_YX: Tensor,
    sums_YX: Tensor | None,
    wanted: Sequence[bool],
    group: str,
    dim: int,
    put_off: PutOff = None,
) -> tuple[Tensor, Tensor]:
    """Under sequence parallelism: of the hidden rows, and of the weight as above."""
    ranks = _ranks(group)
    part, hidden = gradient.movedim(dim, 0).contiguous(), hidden.movedim(dim, 0).contiguous()
    gathered, works = _begin_gathers(part, _pieces(part, ranks.size(), hidden.shape[-1]), ranks)
    places = torch.empty_like(hidden)
    _multiply_as_they_come(gathered, works, weight_YX, None, _by_piece(places, len(works), ranks.size()))
    weight_gradient = weight_YX.new_empty(0)
    if wanted[1]:  # in the order of pieces: a rank's columns are less to reorder than whole rows of the gradient
        rows = torch.stack(_by_piece(hidden, len(works), ranks.size())) if len(works) > 1 else hidden
        weight_gradient = weight_gradient_of(gathered, rows, sums_YX, put_off)
    return places.movedim(0, dim), weight_gradient


def _ranks(group: str) -> dist.ProcessGroup:
    resolve: Callable[[Any], dist.ProcessGroup] = _resolve_process_group  # a name has a type of its own since 2.13
    return resolve(group)


def _pieces(part: Tensor, ranks: int, width: int) -> int:
    """In how many pieces rows go that ranks gather from such parts, or scatter to them, and products so wide."""
    rows = part.shape[:-1].numel() * ranks
    most = min(rows * part.shape[-1] * part.element_size() // LEAST_BYTES, rows * width // LEAST_RESULTS)
    counts = (count for count in (MOST_PIECES, MOST_PIECES // 2) if 1 < count <= most and len(part) % count == 0)
    return next(counts, 1)


def _begin_gathers(part: Tensor, pieces: int, ranks: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """[pieces, rows of all ranks, ...], and what to wait for before each is there."""
    gathered = part.new_empty(pieces, len(part) // pieces * ranks.size(), *part.shape[1:])
    pairs = zip(gathered, part.chunk(pieces), strict=True)
    return gathered, [begin_all_gather(place, piece, ranks) for place, piece in pairs]


def _by_piece(rows: Tensor, pieces: int, ranks: int) -> tuple[Tensor, ...]:
    """Where the rows of each piece stand: some in the part of every rank, [ranks, rows, width]."""
    return rows.view(ranks, pieces, -1, rows.shape[-1]).unbind(1)


def _multiply_as_they_come(
    gathered: Tensor, works: Sequence[dist.Work], matrix: Tensor, bias: Tensor | None, places: Sequence[Tensor]
) -> None:
    for work, rows, place in zip(works, gathered, places, strict=True):
        work.wait()
        _multiply_into(rows.view(len(place), -1, rows.shape[-1]), matrix, bias, place)


def _multiply_into(rows: Tensor, matrix: Tensor, bias: Tensor | None, place: Tensor) -> None:
    """place = rows @ matrix + bias, [batch, rows, width] each; a place need not be contiguous."""
    if is_slow(rows):
        place.copy_(linear_product(rows, matrix.T, bias))
        return
    repeated = matrix.expand(len(rows), -1, -1)
    if bias is None:
        torch.bmm(rows, repeated, out=place)
    else:
        torch.baddbmm(bias, rows, repeated, out=place)


def weight_gradient_of(gradient: Tensor, hidden: Tensor, sums_YX: Tensor | None, put_off: PutOff = None) -> Tensor:
    """Empty if it is put off, or added to the sums."""
    if put_off is not None:
        put_off(gradient, hidden)
    elif sums_YX is not None:
        add_product(sums_YX, gradient, hidden)
    else:
        return product(gradient.flatten(0, -2).T, hidden.flatten(0, -2))
    return gradient.new_empty(0)


def _like_gathered(residual: Tensor, weight_YX: Tensor, bias_Y: Tensor | None, group: str, dim: int) -> Tensor:
    first, *others = residual.movedim(dim, 0).shape[:-1]
    return residual.new_empty(first * _ranks(group).size(), *others, len(weight_YX)).movedim(0, dim)


def _like_gathered_gradients(
    gradient: Tensor,
    residual: Tensor,
    weight_YX: Tensor,
    sums_YX: Tensor | None,
    wanted: Sequence[bool],
    group: str,
    dim: int,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor]:
    reduced = residual.new_empty(residual.movedim(dim, 0).shape).movedim(0, dim)
    reduced = reduced if sequence_parallel else residual.new_empty(residual.shape)
    return reduced if wanted[0] else weight_YX.new_empty(0), _like_weight(weight_YX, sums_YX, wanted)


def _like_reduced(hidden: Tensor, weight_YX: Tensor, group: str, dim: int, sequence_parallel: bool) -> Tensor:
    if not sequence_parallel:
        return hidden.new_empty(*hidden.shape[:-1], len(weight_YX))
    first, *others = hidden.movedim(dim, 0).shape[:-1]
    return hidden.new_empty(first // _ranks(group).size(), *others, len(weight_YX)).movedim(0, dim)


def _like_reduced_gradients(
    gradient: Tensor,
    hidden: Tensor,
    weight_YX: Tensor,
    sums_YX: Tensor | None,
    wanted: Sequence[bool],
    group: str,
    dim: int,
) -> tuple[Tensor, Tensor]:
    found = hidden.new_empty(hidden.movedim(dim, 0).shape).movedim(0, dim)
    return found, _like_weight(weight_YX, sums_YX, wanted)


def _like_weight(weight_YX: Tensor, sums_YX: Tensor | None, wanted: Sequence[bool]) -> Tensor:
    return weight_YX.new_empty(weight_YX.shape if wanted[1] and sums_YX is None else 0)


_GRADIENTS = "Tensor weight, Tensor(a!)? sums, bool[] wanted, str group, int dim"
for _function, _like, _schema in (
    (gathered_product, _like_gathered, "(Tensor residual, Tensor weight, Tensor? bias, str group, int dim) -> Tensor"),
    (
        gathered_product_gradients,
        _like_gathered_gradients,
        f"(Tensor gradient, Tensor residual, {_GRADIENTS}, bool sequence_parallel) -> (Tensor, Tensor)",
    ),
    (
        reduced_product,
        _like_reduced,
        "(Tensor hidden, Tensor weight, str group, int dim, bool sequence_parallel) -> Tensor",
    ),
    (
        reduced_product_gradients,
        _like_reduced_gradients,
        f"(Tensor gradient, Tensor hidden, {_GRADIENTS}) -> (Tensor, Tensor)",
    ),
):
    _LIBRARY.define(_function.__name__ + _schema)
    _LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megatron_retro::{_function.__name__}", _like)
    OPERATORS[getattr(torch.ops.megatron_retro, _function.__name__).default] = _function


def as_one_operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a compiler."""
    return getattr(torch.ops.megatron_retro, function.__name__) if torch.compiler.is_compiling() else function
