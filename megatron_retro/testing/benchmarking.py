"""One form for all benchmarks: candidates interleaved in one run, medians, targets, versions and hardware beside them.

A program in `benchmarks/` defines `run(quick)`, which returns its figures or yields them one by one, and ends with
`benchmark_main(__doc__, run)`. The file is written after every figure, so a run that is cut keeps what it has:

    python benchmarks/NAME.py --json OUT [--quick]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import write_file
from megatron_retro.runtime.console import render_table, say
from megatron_retro.runtime.strict_json import json_text

HIGHER, LOWER = "higher", "lower"
_VERSIONS: tuple[str, ...] = ("torch", "numpy", "sentencepiece", "tokenizers", "gigatoken", "faiss-cpu")
_VERSIONS += ("transformers", "megatron-core", "retro-pytorch", "megatron-retro")


@dataclass(frozen=True)
class Figure:
    """One measured number and what it should be; without a target it informs only."""

    name: str
    value: float
    unit: str
    target: float | None = None
    better: str = HIGHER

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == HIGHER else self.value <= self.target


@dataclass(frozen=True)
class Times:
    """Seconds of every round of one candidate."""

    cpu: tuple[float, ...]
    wall: tuple[float, ...]

    @property
    def median_cpu(self) -> float:
        """CPU-seconds, of children that were waited for too."""
        return statistics.median(self.cpu)

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 0) -> dict[str, Times]:
    """Run the candidates in turn, round after round, so that a busy machine hurts all of them alike."""
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, candidate in candidates.items():
            began, began_cpu = time.perf_counter(), cpu_seconds()
            candidate()
            if number >= warm_up:
                cpu[name].append(cpu_seconds() - began_cpu)
                wall[name].append(time.perf_counter() - began)
    return {name: Times(tuple(cpu[name]), tuple(wall[name])) for name in candidates}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of paired ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def hardware() -> dict[str, Any]:
    """What this machine is."""
    model = next(
        (line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) // 1024 for line in _lines(Path("/proc/meminfo"))), 0)
    return {"cpu": model, "cores": os.cpu_count(), "memory_mb": memory, "gpu": _gpu()}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _gpu() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of what benchmarks depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def benchmark_main(description: str | None, run: Callable[[bool], Iterable[Figure]]) -> None:
    """Parse the flags, run, print the table and write the file; a missed target is a figure, not a failure."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute, without targets")
    arguments = parser.parse_args()
    about, figures = _about(arguments.quick), list[Figure]()
    for figure in run(arguments.quick):
        figures.append(replace(figure, target=None) if arguments.quick else figure)
        _write(arguments.json, {**about, "complete": False}, figures)
    print(render_table(("figure", "value", "unit", "target", "met"), [_row(figure) for figure in figures]))
    _write(arguments.json, {**about, "complete": True}, figures)
    if arguments.json is not None:
        say(f"wrote {arguments.json}")


def _write(path: Path | None, about: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    if path is not None:
        measured = [{**asdict(figure), "met": figure.met} for figure in figures]
        write_file(path, json_text({**about, "figures": measured}, indent=1) + "\n")


def _row(figure: Figure) -> tuple[object, ...]:
    sign = ">=" if figure.better == HIGHER else "<="
    target = "" if figure.target is None else f"{sign} {figure.target:g}"
    met = {None: "", True: "yes", False: "NO"}[figure.met]
    return figure.name, f"{figure.value:.4g}", figure.unit, target, met


def _about(quick: bool) -> dict[str, Any]:
    """What was run, when and on what."""
    return {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *(["--quick"] if quick else [])]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
    }
