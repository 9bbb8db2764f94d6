"""Products that border on a region give what the product and its collective give, in pieces and in any order."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_retro.parallel import overlap
from megatron_retro.parallel.collectives import SEQUENCE_DIM, StreamCut, TensorAxis
from megatron_retro.parallel.layer_transforms import DeferredWeightGradients
from megatron_retro.parallel.region_products import GatheredProduct, ReducedProduct
from megatron_retro.testing.processes import run_ranks

RANKS, ROWS, WIDTH, INNER = 2, 16, 6, 10
OWN, ADDED, DEFERRED = "own", "added to sums", "deferred"
CASES = [
    (sequence_parallel, dim, gradients)
    for sequence_parallel, dim, gradients in itertools.product((True, False), (SEQUENCE_DIM, 0), (OWN, ADDED, DEFERRED))
]


def region(case: tuple[bool, int, str], joined: bool) -> dict[str, Tensor]:
    """A gated product between two borders: what it gives, and all gradients, in float64."""
    sequence_parallel, dim, gradients = case
    axis, cut = TensorAxis(dist.group.WORLD, sequence_parallel), StreamCut(dim)  # type: ignore[arg-type]  # never None here
    generator = torch.Generator().manual_seed(0)
    shape = (3, ROWS, WIDTH) if dim == SEQUENCE_DIM else (ROWS, 3, WIDTH)
    whole, up, bias, down, outer = (
        torch.randn(*each, dtype=torch.float64, generator=generator)
        for each in (shape, (RANKS, INNER, WIDTH), (RANKS, INNER), (RANKS, WIDTH, INNER), shape)
    )
    residual = (whole.chunk(RANKS, dim)[axis.rank] if sequence_parallel else whole).clone().requires_grad_()
    weights = [each[axis.rank].clone().requires_grad_() for each in (up, bias, down)]
    sums = [torch.ones_like(each) if gradients == ADDED else None for each in weights]
    opening, closing = (kind(axis, cut, by_chunks=False) for kind in (GatheredProduct, ReducedProduct))
    deferred = DeferredWeightGradients(after=lambda: None)
    if gradients == DEFERRED:
        opening.defer = closing.defer = deferred.defer
    if joined:
        hidden = opening(residual, weights[0], weights[1], sums[0])
        result = closing(hidden.tanh(), weights[2], None, sums[2])
    else:
        hidden = torch.nn.functional.linear(axis.gather(residual, dim), weights[0], weights[1])
        result = axis.reduce(torch.nn.functional.linear(hidden.tanh(), weights[2]), dim)
    result.backward(outer.chunk(RANKS, dim)[axis.rank] if sequence_parallel else outer)
    if joined:
        deferred.pop()()
    found = {"result": result, "residual": residual.grad, "bias": weights[1].grad}
    for name, weight, total in zip(("up", "down"), weights[::2], sums[::2], strict=True):
        found[name] = weight.grad if total is None or not joined else total - 1
        assert not joined or (weight.grad is None) == (gradients == ADDED)
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def differences() -> list[tuple[Any, str]]:
    """Of all cases, what is not as it should be."""
    wrong = []
    for case in CASES:
        joined, apart = (region(case, joined) for joined in (True, False))
        assert len(joined) == len(apart) == 5
        wrong += [(case, name) for name in apart if not torch.allclose(joined[name], apart[name], 1e-12, 1e-12)]
    return wrong


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_region_computes_what_its_products_and_collectives_do(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MOST_PIECES", pieces)
    monkeypatch.setattr(overlap, "LEAST_BYTES", 1)
    monkeypatch.setattr(overlap, "LEAST_RESULTS", 1)
    assert run_ranks(differences, RANKS) == [[], []]


class Logged:
    """A collective that tells when it is waited for."""

    def __init__(self, work: dist.Work, name: str, events: list[str]) -> None:
        self.work, self.name, self.events = work, name, events

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")
        self.work.wait()


def order_of_a_region() -> list[str]:
    events: list[str] = []

    def logged(name: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            events.append(name)
            result = function(*arguments)
            return Logged(result, name, events) if isinstance(result, dist.Work) else result

        return run

    names = {"begin_all_gather": "gather", "begin_reduce_scatter": "reduce", "_multiply_into": "product"}
    names |= {"product": "product", "weight_gradient_of": "weight's"}
    with ExitStack() as patched:
        for name, event in names.items():
            patched.enter_context(mock.patch.object(overlap, name, logged(event, getattr(overlap, name))))
        region((True, SEQUENCE_DIM, ADDED), joined=True)
    return events


def test_what_does_not_need_a_collective_runs_while_it_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MOST_PIECES", 2), ("LEAST_BYTES", 1), ("LEAST_RESULTS", 1)):
        monkeypatch.setattr(overlap, name, value)
    arriving = ["gather", "gather", "wait gather", "product", "wait gather", "product"]
    leaving = ["product", "reduce", "product", "reduce", "wait reduce", "wait reduce"]
    opening_backward = ["gather", "product", "reduce", "wait gather", "weight's", "wait reduce"]
    for events in run_ranks(order_of_a_region, RANKS):
        assert events == [*arriving, *leaving, *arriving, "weight's", *opening_backward]
