"""One form for all benchmarks: candidates interleaved in one process, medians, figures with versions and hardware.

A program under `benchmarks/` asserts equal output first, measures with `interleaved`, and ends with `write_figures`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_retro.runtime.environment import environment_rows

Clock = Callable[[], float]


@dataclass(frozen=True)
class Figure:
    """One measured number and what it should be."""

    name: str
    value: float
    unit: str
    target: float | None = None
    better: str = "higher"

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def arguments(description: str | None) -> argparse.Namespace:
    """`--json OUT` and `--quick`, the flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    return parser.parse_args()


def interleaved(
    candidates: Mapping[str, Callable[[], object]], repeats: int, clock: Clock = time.process_time
) -> dict[str, float]:
    """Median seconds of each candidate, one run of each in turn after a warm-up; CPU time unless told otherwise."""
    for candidate in candidates.values():
        candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(work: Callable[[], object]) -> int:
    """Resident memory that `work` needs beyond what the process holds before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def write_figures(path: Path, figures: Sequence[Figure], **settings: object) -> None:
    """The results file: figures, the machine and versions, and the settings of this run."""
    rows = [{**asdict(figure), "met": figure.met} for figure in figures]
    content = {"figures": rows, "environment": dict(environment_rows()), "settings": settings}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
