"""The products that open and close a region of the tensor axis, each with its collective beside it (`overlap`).

Under sequence parallelism a region's first product reads rows that all ranks gather, and its last one gives parts of
sums that ranks reduce and scatter. What does not need a collective runs while it is under way:

    opening   forward: the rows come in pieces, each beside the product of the one before
              backward: the input was kept as this rank's part, and is gathered again beside the product that gives its
              gradient, which is reduced beside the product that gives the weight's
    closing   forward: the rows go in pieces, each beside the product of the next one
              backward: the rows of the gradient come in pieces

Without sequence parallelism there is one sum in each direction, beside the same products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_retro.ops.cpu_products import linear_product, product
from megatron_retro.ops.linear import linear
from megatron_retro.ops.weight_gradients import adding_linear
from megatron_retro.parallel.collectives import StreamCut, TensorAxis
from megatron_retro.parallel.overlap import (
    PutOff,
    as_one_operator,
    gathered_product,
    gathered_product_gradients,
    reduced_product,
    reduced_product_gradients,
    weight_gradient_of,
)

Defer = Callable[[Tensor, Tensor | None, Tensor, Tensor], None]


class RegionProduct:
    """In the place of a leaf's product; the collective on this side of the region is part of it, where it `acts`.

    `defer` takes what a weight's gradient is computed from, where that has to wait (`DeferredWeightGradients`).
    """

    def __init__(self, axis: TensorAxis, cut: StreamCut, *, by_chunks: bool) -> None:
        self._group, self._cut = axis.group.group_name, cut
        self._sequence_parallel, self._by_chunks = axis.sequence_parallel, by_chunks
        self.defer: Defer | None = None

    def acts(self) -> bool:
        """Else the region gathers and reduces by itself: where text is generated, and where neighbours are cut along R,
        which a region that joins them needs in another order."""
        generates = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        return not generates and (self._cut.dim == 0 or not self._by_chunks or not self._sequence_parallel)

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, sums: Tensor | None = None) -> Tensor:
        """The product; with `sums` its backward adds the weight's gradient to them."""
        if not self.acts():
            return linear(hidden, weight, bias) if sums is None else adding_linear(hidden, weight, bias, sums)
        border = (self._group, self._cut.dim, self._sequence_parallel)
        return self._apply(hidden, weight, bias, sums, border, self.defer)

    def _apply(self, *given: Any) -> Tensor:
        raise NotImplementedError


class GatheredProduct(RegionProduct):
    """Opens a region: this rank's part of the residual stream in, all rows out."""

    def _apply(self, *given: Any) -> Tensor:
        result: Tensor = _Gathered.apply(*given)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return result


class ReducedProduct(RegionProduct):
    """Closes a region: all rows in, this rank's part of the residual stream out; the bias is not this one's."""

    def _apply(self, *given: Any) -> Tensor:
        hidden, weight, _, *more = given
        result: Tensor = _Reduced.apply(hidden, weight, *more)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return result


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        weight_YX: Tensor,
        bias_Y: Tensor | None,
        sums_YX: Tensor | None,
        border: tuple[str, int, bool],
        defer: Defer | None,
    ) -> Tensor:
        ctx.save_for_backward(residual, weight_YX, sums_YX)
        ctx.border, ctx.put_off = border, _put_off(defer, weight_YX, sums_YX)
        group, dim, sequence_parallel = border
        if not sequence_parallel:
            return linear_product(residual, weight_YX, bias_Y)
        gathered: Tensor = as_one_operator(gathered_product)(residual, weight_YX, bias_Y, group, dim)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        residual, weight_YX, sums_YX = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        group, dim, sequence_parallel = ctx.border
        given = gradient, residual, weight_YX, sums_YX, wanted, group, dim, sequence_parallel
        if ctx.put_off is None:
            found = as_one_operator(gathered_product_gradients)(*given)
        else:
            found = gathered_product_gradients(*given, ctx.put_off)
        bias_gradient = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        own = ctx.put_off is None and sums_YX is None
        return found[0] if wanted[0] else None, found[1] if wanted[1] and own else None, bias_gradient, None, None, None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_YX: Tensor,
        sums_YX: Tensor | None,
        border: tuple[str, int, bool],
        defer: Defer | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight_YX, sums_YX)
        ctx.border, ctx.put_off = border, _put_off(defer, weight_YX, sums_YX)
        reduced: Tensor = as_one_operator(reduced_product)(hidden, weight_YX, *border)
        return reduced

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_YX, sums_YX = ctx.saved_tensors
        wanted, (group, dim, sequence_parallel) = ctx.needs_input_grad[:2], ctx.border
        own = ctx.put_off is None and sums_YX is None
        if not sequence_parallel:
            hidden_gradient = product(gradient, weight_YX) if wanted[0] else None
            weight_gradient = weight_gradient_of(gradient, hidden, sums_YX, ctx.put_off) if wanted[1] else None
            return hidden_gradient, weight_gradient if own else None, None, None, None
        given = gradient, hidden, weight_YX, sums_YX, wanted, group, dim
        if ctx.put_off is None:
            found = as_one_operator(reduced_product_gradients)(*given)
        else:
            found = reduced_product_gradients(*given, ctx.put_off)
        return found[0] if wanted[0] else None, found[1] if wanted[1] and own else None, None, None, None


def _put_off(defer: Defer | None, weight_YX: Tensor, sums_YX: Tensor | None) -> PutOff:
    return None if defer is None else lambda gradient, hidden: defer(weight_YX, sums_YX, hidden, gradient)
