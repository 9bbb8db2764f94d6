"""A plan says where the host, and not the GPU, would set the pace, and which microbatch is long enough."""

from __future__ import annotations

import re
from typing import Any

from megatron_retro.config.hardware import accelerator
from megatron_retro.config.settings import Settings
from megatron_retro.planning.plan import make_plan
from megatron_retro.planning.plan_text import host_lines
from tests.planning.recipes import recipe

GPT = {"retro_add_retriever": False, "retro_layers": None, "num_layers": 2}


def said(settings: Settings) -> str:
    return "".join(host_lines(make_plan(settings, accelerator("H100"))))


def test_the_microbatch_that_is_named_is_about_enough() -> None:
    found = re.search(r"--micro-batch-size (\d+) ", said(recipe(**GPT)))
    assert found is not None
    enough = int(found[1])
    assert enough > 2
    for size, is_enough in ((enough * 9 // 10, False), (enough * 11 // 10, True)):
        assert (said(recipe(**GPT, micro_batch_size=size, global_batch_size=8 * size)) == "") is is_enough


def test_eager_layers_and_those_of_tensor_ranks_need_more_of_the_gpu() -> None:
    changes: tuple[dict[str, Any], ...] = ({}, {"compile": False}, {"tensor_model_parallel_size": 2})
    found = [re.search(r"size (\d+) ", said(recipe(**GPT, **change))) for change in changes]
    compiled, eager, cut = (int(each[1]) for each in found if each is not None)
    assert compiled < eager and 2 * compiled < cut
