"""Counts the operators of a traced part: how many are dispatched, launch a kernel or talk, and the bytes of products.

A plan needs sums of bytes and operations (`recorder.py`); this tells what a step is made of, for
`benchmarks/step_cost.py`, and counts another library's layer by the same rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_retro.planning.recorder import WITHOUT_KERNEL, Recorder, size


@dataclass
class OperatorCounts:
    """Forward and backward of one part."""

    operators: int = 0  # that torch dispatches, views among them
    kernels: int = 0  # operators that read or write memory: at least one kernel each
    groups: int = 0  # what is left if each run of operators between products and collectives became one kernel
    products: int = 0  # matrix products and attentions
    collectives: int = 0
    product_bytes: float = 0.0  # operands read once and results written once
    in_group: bool = False  # whether the last operator can be joined to the next


class OperatorCounter(Recorder):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """A recorder that also counts operators, for each part."""

    def __init__(self, given: Iterable[Tensor], context: ProcessGroup | None = None) -> None:
        super().__init__(given, context)
        self.counts: dict[str, OperatorCounts] = defaultdict(OperatorCounts)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        running = self.running
        before = self._flops(running)
        result = super().__torch_dispatch__(function, types, arguments, keywords)
        self._count(self.counts[running], function, self._flops(running) > before, (arguments, result))
        return result

    def _flops(self, name: str) -> float:
        return self.part(name).forward_flops + self.part(name).backward_flops

    @staticmethod
    def _count(counts: OperatorCounts, function: Any, is_product: bool, tensors: Any) -> None:
        if function.namespace == "prim":
            return
        counts.operators += 1
        if function.is_view or function.__name__.startswith(WITHOUT_KERNEL):
            return
        if function.namespace == "c10d":
            counts.collectives += 1
            counts.in_group = False
            return
        counts.kernels += 1
        if is_product:
            counts.products += 1
            counts.product_bytes += size(tensors)
        counts.groups += is_product or not counts.in_group
        counts.in_group = not is_product
