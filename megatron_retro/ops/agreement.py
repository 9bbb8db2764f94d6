"""All ranks of a run compute with the same backends: what they decided apart is settled before a model is built."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_retro.ops.backend_names import AUTO, FLOAT32, HALF, NATIVE, REFERENCE
from megatron_retro.ops.backends import VARIABLE, backends_of, choice
from megatron_retro.ops.verdicts import PROVEN
from megatron_retro.runtime.console import warn


def settle_kernels(device: torch.device) -> None:
    """Every rank of the default group calls it once, before its first model; kernels are proven here at the latest.

    An operator that ranks would compute in different ways (another kind of GPU, a timing that fell otherwise where
    hosts share no cache folder) is computed by its reference on all of them.
    """
    places = [(operator, precision) for operator in PROVEN for precision in (FLOAT32, HALF)]
    codes = [backends_of(operator).index(choice(operator, device.type, level).backend) for operator, level in places]
    mine = torch.tensor(codes, device=device)
    extremes = torch.stack((mine, -mine))
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    differ = (extremes[0] != -extremes[1]).tolist()
    apart = sorted({operator for (operator, _), differs in zip(places, differ, strict=True) if differs})
    if not apart:
        return
    os.environ[VARIABLE] = _with_references(os.environ.get(VARIABLE, AUTO), apart)
    if dist.get_rank() == 0:
        warn(f"ranks chose different kernels for {', '.join(apart)}: the {REFERENCE} serves on all of them")


def _with_references(wish: str, operators: list[str]) -> str:
    """A wish that differs from another in nothing but these operators."""
    if wish in (AUTO, REFERENCE, NATIVE):
        kept = dict.fromkeys(PROVEN, wish)
    else:
        kept = dict(pair.split("=", 1) for pair in wish.split(","))
    return ",".join(f"{name}={backend}" for name, backend in {**kept, **dict.fromkeys(operators, REFERENCE)}.items())
