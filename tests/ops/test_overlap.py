"""Products that no collective needs stand behind one that has begun, and nothing else moves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch._inductor.utils

from megatron_retro.ops.overlap import products_beside_collectives


class ExternKernelSchedulerNode:
    """Stands in for a scheduler's node: it makes one buffer of its own name."""

    def __init__(self, name: str, *needs: str) -> None:
        self.name = name
        self.unmet_dependencies = [SimpleNamespace(name=need) for need in needs]

    def get_buffer_names(self) -> set[str]:
        return {self.name}


class Pointwise(ExternKernelSchedulerNode):
    pass


Node = ExternKernelSchedulerNode
BACKWARD = (
    Node("gather 1"),
    Node("wait 1", "gather 1"),
    Node("input 1", "wait 1"),
    Node("weight 1", "wait 1"),
    Node("input 2", "input 1"),
    Node("weight 2", "input 1"),
    Node("scatter 1", "input 2"),
    Node("wait 2", "scatter 1"),
    Pointwise("norm", "wait 2"),
    Node("gather 2", "norm"),
    Node("wait 3", "gather 2"),
    Node("weight 3", "wait 3"),
)


@pytest.fixture(autouse=True)
def _kinds_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    is_collective = lambda node: node.name.startswith(("gather", "scatter"))  # noqa: E731
    monkeypatch.setattr(torch._inductor.utils, "contains_collective", is_collective)
    monkeypatch.setattr(torch._inductor.utils, "contains_wait", lambda node: node.name.startswith("wait"))


def order(*nodes: Any) -> list[str]:
    return [node.name for node in products_beside_collectives(nodes)]


def test_each_collective_behind_a_weight_gradient_runs_beside_one() -> None:
    assert " | ".join(order(*BACKWARD)) == (
        "gather 1 | wait 1 | input 1 | input 2 | scatter 1 | weight 1 | wait 2 | norm | gather 2 | weight 2 | wait 3"
        " | weight 3"
    )


def test_a_product_behind_the_wait_comes_before_it() -> None:
    late = (*BACKWARD[:5], *BACKWARD[6:9], BACKWARD[5], *BACKWARD[9:])
    names = order(*late)
    assert names.index("scatter 1") < names.index("weight 1") < names.index("wait 2")
    assert names.index("gather 2") < names.index("weight 2") < names.index("wait 3")


def test_what_reads_a_product_stays_behind_it() -> None:
    nodes = (*BACKWARD[:6], Pointwise("cast", "weight 1"), *BACKWARD[6:])
    names = order(*nodes)
    assert names.index("weight 1") < names.index("cast")
    assert sorted(names) == sorted(node.name for node in nodes)


def test_without_collectives_nothing_moves() -> None:
    nodes = (Node("a"), Node("b", "a"), Pointwise("c", "b"))
    assert order(*nodes) == ["a", "b", "c"]
