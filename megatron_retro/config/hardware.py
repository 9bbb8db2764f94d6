"""Rates and sizes of accelerators: a table in TOML that a cluster can replace by its own (`--plan-hardware-table`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.toml_files import nearest, parse_toml
from megatron_retro.errors import ConfigError

BUILT_IN = Path(__file__).with_name("hardware.toml")
_OTHER_CLOCKS = {"PCIe", "PCIE", "NVL"}


@dataclass(frozen=True)
class Accelerator:
    """One row of the table; the comments in `hardware.toml` say what each number means."""

    name: str
    memory_gb: float
    peak_tflops: float
    matmul_tflops: float
    memory_tb_per_s: float
    node_gb_per_s: float
    network_gb_per_s: float
    sustained: float

    @property
    def memory_bytes(self) -> float:
        """Usable memory."""
        return self.memory_gb * 1e9


def read_hardware(path: Path | None = None) -> dict[str, Accelerator]:
    """Every accelerator of the table."""
    source = path or BUILT_IN
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the hardware table {source}", got=error.strerror) from None
    rows = parse_toml(text, str(source))
    return {name: _row(name, row, source) for name, row in rows.items()}


def machine_of(planning: PlanningConfig) -> Accelerator:
    """The accelerator that a plan is for."""
    table = planning.plan_hardware_table
    return accelerator(planning.plan_hardware, None if table is None else Path(table))


def accelerator(name: str, path: Path | None = None) -> Accelerator:
    """The named row."""
    table = read_hardware(path)
    if name not in table:
        raise ConfigError(
            f"the hardware table has no {name!r}{nearest(name, table)}",
            expected=", ".join(table),
            fix=f"add a table [{name}] to a copy of {BUILT_IN.name} and give it with --plan-hardware-table",
        )
    return table[name]


def known_accelerator(device: str) -> Accelerator | None:
    """The row for a device's own name (`NVIDIA A100-SXM4-40GB`): the one all of whose words are in it, the longest.

    Cards of the same chip with other clocks say so; they have no row unless it says so too.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    rows = [
        row
        for row in read_hardware().values()
        if (named := set(row.name.split("-"))) <= words and words & _OTHER_CLOCKS <= named
    ]
    return max(rows, key=lambda row: len(row.name), default=None)


def _row(name: str, row: object, source: Path) -> Accelerator:
    wanted = [field.name for field in fields(Accelerator) if field.name != "name"]
    given = row if isinstance(row, dict) else {}
    wrong = [key for key in wanted if not isinstance(given.get(key), (int, float)) or given[key] <= 0]
    if wrong or set(given) - set(wanted):
        raise ConfigError(
            f"{source}: [{name}] is not a complete row",
            got=f"missing or not positive: {', '.join(wrong) or 'none'}; unknown: {set(given) - set(wanted) or 'none'}",
            expected=", ".join(wanted),
        )
    return Accelerator(name=name, **{key: float(given[key]) for key in wanted})
