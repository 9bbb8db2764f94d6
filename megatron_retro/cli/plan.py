"""`megatron-retro plan`: what a recipe costs on a cluster, before a node is booked."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings

DESCRIPTION = (
    "Size, time, price and faults of a recipe on a cluster (--plan-nodes, --plan-hardware), without starting it. "
    "Exit 2 if it cannot run as it stands. --suggest lists the best layouts."
)
SECTIONS: tuple[type, ...] = ALL_SECTIONS
POSITIONAL: Positional | None = Positional("words", "*", "words of the verb that would run; not read")


def run(settings: Settings, positional: Sequence[str]) -> int:
    """Print the plan."""
    from megatron_retro.planning.report import print_plan

    return print_plan(settings)
