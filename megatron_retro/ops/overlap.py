"""An order for compiled graphs in which products stand beside collectives.

A graph's backward computes the gradient of a weight where it can be, and then waits for each collective that the rest
needs. But no collective waits for a weight's gradient: such products stand behind one that has begun and before the
wait for it, wherever they stood. All else keeps its order; that of collectives is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def products_beside_collectives(nodes: Sequence[Any]) -> list[Any]:
    """The nodes of an inductor's scheduler in another order (a pass of `reorder_for_compute_comm_overlap_passes`)."""
    from torch._inductor.utils import contains_collective

    free = _free_products(nodes)
    left = sum(map(contains_collective, nodes))
    if not left or not free:
        return list(nodes)
    to_come = {name for node in nodes for name in node.get_buffer_names()}
    put_off = [node for node in nodes if node in free]
    ordered: list[Any] = []

    def put(node: Any) -> None:
        ordered.append(node)
        to_come.difference_update(node.get_buffer_names())

    for node in nodes:
        if node in free:
            continue
        while _needs(node, put_off):
            put(put_off.pop(0))
        put(node)
        if contains_collective(node):
            ready = [each for each in put_off if not to_come & _names(each)]
            for each in ready[: -(-len(ready) // left)]:
                put_off.remove(each)
                put(each)
            left -= 1
    return ordered + put_off


def _free_products(nodes: Sequence[Any]) -> set[Any]:
    """Products that no collective needs, however far behind."""
    from torch._inductor.utils import contains_collective, contains_wait

    needed: set[str] = set()
    free = set()
    for node in reversed(nodes):
        if contains_collective(node) or contains_wait(node) or needed & node.get_buffer_names():
            needed |= _names(node)
        elif type(node).__name__ == "ExternKernelSchedulerNode":
            free.add(node)
    return free


def _needs(node: Any, others: Sequence[Any]) -> bool:
    names = _names(node)
    return any(names & other.get_buffer_names() for other in others)


def _names(node: Any) -> set[str]:
    """Buffers that a node reads, or must come after."""
    return {dependency.name for dependency in node.unmet_dependencies}
