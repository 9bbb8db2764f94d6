"""`environment`: what this machine has, and why something is not used."""

from __future__ import annotations

import torch

from megatron_retro.ops.backends import backend_rows
from megatron_retro.optim.optimizer import optimizer_rows
from megatron_retro.runtime.console import render_table
from megatron_retro.runtime.environment import environment_rows


def print_environment() -> None:
    """Print the table of parts and their states."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(render_table(("part", "state"), [*environment_rows(), *backend_rows(device), *optimizer_rows(device)]))
