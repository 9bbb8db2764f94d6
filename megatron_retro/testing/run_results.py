"""What a finished run left: its tensors bit for bit, its losses."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.checkpoint.loading import load_tensors, open_checkpoint
from megatron_retro.checkpoint.shard_files import DTYPES
from megatron_retro.runtime.run_log import read_run_log


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, whole."""
    checkpoint = open_checkpoint(path)
    tensors = {
        name: torch.empty(size, dtype=DTYPES[checkpoint.index.dtypes[name]])
        for name, size in checkpoint.index.sizes.items()
    }
    load_tensors(checkpoint, tensors)
    return tensors


def differences(first: Path, second: Path, *, prefix: str = "") -> list[str]:
    """Names of tensors that are not bit-equal in the newest checkpoints of two runs."""
    one, other = stored_tensors(first), stored_tensors(second)
    names = {name for name in one.keys() | other.keys() if name.startswith(prefix)}
    return sorted(
        name for name in names if not torch.equal(one.get(name, torch.empty(0)), other.get(name, torch.empty(0)))
    )


def losses(run: Path) -> list[float]:
    """Training loss of every step."""
    return read_run_log(run).curve("loss")[1]
