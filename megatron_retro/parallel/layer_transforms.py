"""What training does to the layers of a plain model, apart from cutting and sharding them; none changes their names.

**Recomputation**: what a layer's backward computes again instead of keeping. As it is, a layer keeps what reductions,
matrix products and attention gave, and norms and nonlinearities compute theirs again (`ops.recomputation`). `full`
keeps a layer's inputs only: cross-attention is covered, and the neighbour encoder as part of the first retrieval layer,
whose call encodes; a layer's collectives of the tensor axis are repeated.

**Compilation**: torch.compile makes kernels of each layer's code, collectives of the tensor axis included: one graph
for all layers of a kind. Where a layer calls the encoder, what stands before and behind it is compiled. Hooks of the
layer itself (FSDP2's, random streams) stay outside, as recomputation does, which runs the compiled layer again.

**FP8**: the matrices of all layers are multiplied in eight bits.

**Deferred weight gradients** let zero-bubble schedules fill their bubbles: a linear layer's backward computes the
gradient of its input at once, and the gradient of its weight when the schedule has nothing better to do. Everything
else about the backward is the usual one, so frozen parts, recomputation and FSDP2 need no care. (torch's own split,
which walks the graph of a stage, gives two groups of parameters the same nodes where parameters meet the stage's input
along several paths, as those of the encoder do, and fails there.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_retro.model.layers import DecoderLayer
from megatron_retro.model.leaves import Linear
from megatron_retro.model.retro import Retro
from megatron_retro.ops.backends import backend_of
from megatron_retro.ops.compilation import LayerCompiler
from megatron_retro.ops.cpu_products import linear_product, product
from megatron_retro.ops.linear import fp8_linear
from megatron_retro.ops.weight_gradients import add_product
from megatron_retro.parallel.randomness import has_dropout
from megatron_retro.parallel.region_products import RegionProduct


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Compute a module by another function. Its parameters, hooks and name stay."""
    vars(module)["forward"] = forward


def compile_layers(model: Retro) -> None:
    """Let every layer of decoder and encoder run as it is compiled."""
    compiler = LayerCompiler()
    for layer in layers_of(model):
        for name, part in parts_of(layer):
            replace_part(layer, name, compiler.compiled(part))


def layers_of(model: Retro) -> list[nn.Module]:
    """Of decoder and encoder."""
    return [*model.layers.values(), *(() if model.encoder is None else model.encoder.layers.values())]


def parts_of(layer: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """The functions that a layer's call consists of: where it calls the encoder, what stands before and behind it."""
    names = ("whole", "before_encoding", "behind_encoding") if isinstance(layer, DecoderLayer) else ("forward",)
    return [(name, getattr(layer, name)) for name in names]


def replace_part(layer: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Compute one of them by another function, inside of recomputation and of the layer's hooks."""
    vars(layer)[name] = function


def recompute_layers(model: Retro, granularity: str) -> None:
    """Let every layer recompute, as `granularity` says; states of random numbers stay where something is dropped."""
    if granularity == "full":
        draws = has_dropout(model, model.model, model.retro)
        for layer in model.layers.values():
            replace_forward(layer, _recomputing(layer.forward, draws))


def _recomputing(plain: Callable[..., Any], draws: bool) -> Callable[..., Any]:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*arguments, **keywords)
        return checkpoint(plain, *arguments, use_reentrant=False, preserve_rng_state=draws, **keywords)

    return forward


def multiply_in_fp8(model: Retro, device: torch.device, exempt: Callable[[str], bool]) -> None:
    """Multiply the matrices of all layers in FP8, but the exempt ones; refused where nothing can."""
    backend_of("fp8_linear", device.type)
    for name, part in model.named_modules():
        if isinstance(part, Linear) and "layers." in name and not exempt(name):
            part.multiply = fp8_linear


class DeferredWeightGradients:
    """The weight gradients of one stage that are still to be computed, in the order of the backward.

    `after` is called whenever some of them have been computed.
    """

    def __init__(self, after: Callable[[], None]) -> None:
        self._deferred: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
        self._after = after

    def attach(self, module: nn.Module) -> None:
        """Let every linear layer of a module defer its weight's gradient."""
        for part in module.modules():
            if isinstance(part, Linear) and isinstance(part.multiply, RegionProduct):
                part.multiply.defer = self.defer
            elif isinstance(part, Linear):
                part.multiply = self.multiply

    def multiply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, sums: Tensor | None = None) -> Tensor:
        """`functional.linear`, whose backward defers the weight's gradient: autograd's, or added to `sums`."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return linear_product(hidden, weight, bias)
        given = hidden, weight, sums, self
        result: Tensor = _Product.apply(*given)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return result if bias is None else result + bias

    def defer(self, weight: Tensor, sums: Tensor | None, hidden: Tensor, gradient: Tensor) -> None:
        """Keep what one weight's gradient is computed from, without how that was computed: a schedule records."""
        self._deferred.append((weight, sums, hidden.detach(), gradient.detach()))

    def pop(self) -> Callable[[], None]:
        """All that is deferred now, as one call that computes it and adds it to the weights' gradients."""
        deferred, self._deferred = self._deferred, []

        def compute() -> None:
            for weight, sums, hidden, gradient in deferred:
                if sums is not None:
                    add_product(sums, gradient, hidden)
                    continue
                weight_gradient = product(gradient.flatten(0, -2).T, hidden.flatten(0, -2))
                torch.autograd.backward(weight, weight_gradient.to(weight.dtype))
            deferred.clear()
            self._after()

        return compute


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, sums: Tensor | None, owner: DeferredWeightGradients
    ) -> Tensor:
        context.save_for_backward(hidden)
        context.weight, context.sums, context.owner = weight, sums, owner
        return linear_product(hidden, weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (hidden,) = context.saved_tensors
        context.owner.defer(context.weight, context.sums, hidden, gradient)
        return product(gradient, context.weight) if context.needs_input_grad[0] else None, None, None, None
