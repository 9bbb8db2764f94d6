"""`megatron-retro environment`: what this machine has, and why something is not used."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.settings import Settings

DESCRIPTION = (
    "Versions, devices, optional packages, kernels and optimizers of this machine, with the reason for each absence."
)
SECTIONS: tuple[type, ...] = ()
POSITIONAL: Positional | None = None


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Print the table."""
    from megatron_retro.ops.backends import backend_rows
    from megatron_retro.optim.optimizer import optimizer_rows
    from megatron_retro.runtime.console import render_table
    from megatron_retro.runtime.environment import environment_rows

    print(render_table(("part", "state"), [*environment_rows(), *backend_rows(), *optimizer_rows()]))
