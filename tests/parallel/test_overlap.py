"""What a step sends stands beside products that do not need it: told by the order in which a rank begins both."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.assembly.parallel_model import build_parallel_model
from megatron_retro.config.settings import Settings
from megatron_retro.testing.layouts import random_batches, tiny_settings
from megatron_retro.testing.processes import run_ranks

PRODUCT, REDUCE, GATHER, WAIT = "product", "reduce", "gather", "wait"
_KINDS = {
    "mm": PRODUCT,
    "addmm": PRODUCT,
    "add_product": PRODUCT,
    "_reduce_scatter_base_": REDUCE,
    "_allgather_base_": GATHER,
}
GPT = {
    "retro_add_retriever": False,
    "retro_layers": None,
    "global_batch_size": 8,
    "data_parallel_sharding": "optimizer",
}
PIPELINE = {"pipeline_model_parallel_size": 2}


class Order(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products and collectives as they begin, and where the compute stream begins to wait for reductions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        kind = _KINDS.get(function.overloadpacket.__name__)
        self.events += [kind] if kind else []
        return function(*arguments, **(keywords or {}))


def order_of_a_step(settings: Settings) -> list[str]:
    model = build_parallel_model(settings, torch.device("cpu"))
    share = random_batches(settings, neighbors=False)[:4]
    order, finalize = Order(), FSDPParamGroup.finalize_backward

    def waiting(group: FSDPParamGroup) -> None:
        order.events.append(WAIT)
        finalize(group)

    with mock.patch.object(FSDPParamGroup, "finalize_backward", waiting), order:
        model.train_step(share)
    return order.events


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"num_layers": 2}),
        (4, {**PIPELINE, "num_layers": 4}),
        pytest.param(4, {**PIPELINE, "pipeline_schedule": "gpipe", "num_layers": 4}, marks=pytest.mark.full),
        pytest.param(4, {**PIPELINE, "pipeline_schedule": "interleaved", "num_layers_per_virtual_pipeline_stage": 1},
                     marks=pytest.mark.full),
    ],
    ids=["data", "1f1b", "gpipe", "interleaved"],
)  # fmt: skip
def test_gradients_are_reduced_beside_the_backward_of_other_layers(world_size: int, layout: dict[str, Any]) -> None:
    for events in run_ranks(order_of_a_step, world_size, tiny_settings(**{**GPT, **layout})):
        reductions = [place for place, kind in enumerate(events) if kind == REDUCE]
        products = [place for place, kind in enumerate(events) if kind == PRODUCT]
        assert len(reductions) >= 2
        beside = [place for place in products if reductions[0] < place < reductions[-1]]
        assert len(beside) >= 8, "a layer's backward has eight products"
        assert all(place < events.index(WAIT) for place in reductions + products), "nothing waits before the step ends"


def test_parameters_are_gathered_before_the_layer_in_front_computes() -> None:
    for events in run_ranks(order_of_a_step, 2, tiny_settings(**GPT, num_layers=4)):
        first = events.index(PRODUCT)
        assert events[:first].count(GATHER) == 3, "of embedding and head, and of two layers"
        assert events[: events.index(REDUCE)].count(GATHER) == 5, "once in a step"
