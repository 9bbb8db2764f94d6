"""What training does to the layers of a plain model, apart from cutting and sharding them; none changes their names.

**Recomputation**: what a layer's backward computes again instead of keeping. `full` keeps a layer's inputs only, and
covers the neighbour encoder as part of the first retrieval layer, whose call encodes. `selective` keeps what matrix
products and attention gave and computes the rest again (norms, activations, rotations, residual sums), in every layer
of decoder and encoder. The layer that encodes neighbours does so part by part (attention, cross-attention, MLP),
because its call runs units of FSDP2 inside, which torch cannot replay selectively. Both cover cross-attention, and both
repeat a layer's collectives of the tensor axis.

**FP8**: the matrices of all layers are multiplied in eight bits.

**Deferred weight gradients** let zero-bubble schedules fill their bubbles: a linear layer's backward computes the
gradient of its input at once, and the gradient of its weight when the schedule has nothing better to do. Everything
else about the backward is the usual one, so frozen parts, recomputation and FSDP2 need no care. (torch's own split,
which walks the graph of a stage, gives two groups of parameters the same nodes where parameters meet the stage's input
along several paths, as those of the encoder do, and fails there.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megatron_retro.model.leaves import Linear
from megatron_retro.model.retro import Retro
from megatron_retro.ops.backends import backend_of
from megatron_retro.ops.linear import fp8_linear

_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product",
    "aten::_scaled_mm",
    "megatron_retro::chunked_cross_attention",
)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Compute a module by another function. Its parameters, hooks and name stay."""
    vars(module)["forward"] = forward


def recompute_layers(model: Retro, granularity: str) -> None:
    """Let every layer recompute, as `granularity` says."""
    if granularity == "full":
        for layer in model.layers.values():
            replace_forward(layer, _recomputing(layer.forward, None))
    if granularity == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        for name, layer in model.layers.items():
            for part in _parts(layer) if int(name) == model.first_retrieval_layer else [layer]:
                replace_forward(part, _recomputing(part.forward, contexts))
        for layer in [] if model.encoder is None else model.encoder.layers.values():
            replace_forward(layer, _recomputing(layer.forward, contexts))


def _parts(layer: nn.Module) -> list[nn.Module]:
    """What a decoder layer calls beside its norms, whose outputs these calls keep."""
    return [layer.get_submodule(name) for name in ("attention", "cross_attention", "mlp")]


def _recomputing(plain: Callable[..., Any], contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*arguments, **keywords)
        options: dict[str, Any] = {"use_reentrant": False}
        if contexts is not None:
            options["context_fn"] = contexts
        return checkpoint(plain, *arguments, **options, **keywords)

    return forward


def _policy(context: SelectiveCheckpointContext, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    name = str(getattr(operator, "name", lambda: operator)())
    return CheckpointPolicy.MUST_SAVE if keeps(name) else CheckpointPolicy.PREFER_RECOMPUTE


def keeps(operator_name: str) -> bool:
    """Whether selective recomputation keeps what this operator gives."""
    return operator_name.startswith(_KEPT)


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
        self._deferred: list[tuple[Tensor, Tensor, Tensor]] = []
        self._after = after

    def attach(self, module: nn.Module) -> None:
        """Let every linear layer of a module defer its weight's gradient."""
        for part in module.modules():
            if isinstance(part, Linear):
                part.multiply = self.multiply

    def multiply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`functional.linear`, whose backward defers the weight's gradient."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return functional.linear(hidden, weight, bias)
        product: Tensor = _Product.apply(hidden, weight, self)  # type: ignore[no-untyped-call]
        return product if bias is None else product + bias

    def defer(self, weight: Tensor, hidden: Tensor, gradient: Tensor) -> None:
        """Keep what one weight's gradient is computed from."""
        self._deferred.append((weight, hidden, gradient))

    def pop(self) -> Callable[[], None]:
        """All that is deferred now, as one call that computes it and adds it to the weights' gradients."""
        deferred, self._deferred = self._deferred, []

        def compute() -> None:
            for weight, hidden, gradient in deferred:
                product = gradient.flatten(0, -2).T @ hidden.flatten(0, -2)
                torch.autograd.backward(weight, product.to(weight.dtype))
            deferred.clear()
            self._after()

        return compute


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, owner: DeferredWeightGradients) -> Tensor:
        context.save_for_backward(hidden)
        context.weight, context.owner = weight, owner
        return functional.linear(hidden, weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        (hidden,) = context.saved_tensors
        context.owner.defer(context.weight, hidden, gradient)
        return gradient @ context.weight if context.needs_input_grad[0] else None, None, None
