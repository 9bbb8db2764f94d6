"""Options of the tests: `--full` runs the counts that take long and records them, the default a seeded part.

Tests that need a torch with CUDA (`./tests/run.sh --cuda-build`) are recorded too: few machines run them.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

RESULTS = Path(__file__).parent / "results"
LONGEST_SECONDS = 3600  # of one test under --full
long_reports = pytest.StashKey[list[pytest.TestReport]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full counts of long tests, results to tests/results/")


def pytest_configure(config: pytest.Config) -> None:
    from megatron_retro.testing.processes import settle_autograd

    settle_autograd()
    config.stash[long_reports] = []
    # Workers of xdist send their reports to the one process that records them.
    records = config.getoption("--full") or config.getoption("markexpr") == "cuda_build"
    if records and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.stash[long_reports]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # nothing long is left for the end
    for item in items:
        if config.getoption("--full") and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LONGEST_SECONDS))
        if item.get_closest_marker("cuda_build") is not None:
            item.user_properties.append(("count", 1))
        if item.get_closest_marker("full") is None:
            continue
        item.user_properties.append(("count", 1))
        if not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="runs under ./tests/run.sh --full"))


def pytest_collection_finish() -> None:
    """What imports and collection have made stays: no later collection of garbage, one before every fork, walks it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`count(quick, full)`: how many repetitions this run makes."""

    def chosen(quick: int, whole: int) -> int:
        if not request.config.getoption("--full"):
            return quick
        request.node.user_properties.append(("count", whole))
        return whole

    return chosen


class Recorder:
    """Keeps the outcome of each long test, one file an area: a run of some of them leaves the others' lines alone."""

    def __init__(self, reports: list[pytest.TestReport]) -> None:
        self.reports = reports

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ran = report.when == "call" or (report.when == "setup" and report.outcome != "passed")
        if ran and dict(report.user_properties).get("count"):
            self.reports.append(report)

    def pytest_sessionfinish(self) -> None:
        areas: dict[str, dict[str, object]] = {}
        for report in self.reports:
            areas.setdefault(report.nodeid.split("/")[1], {})[report.nodeid] = row(report)
        for area, rows in areas.items():
            path = RESULTS / f"{area}.json"
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            text = json.dumps(dict(sorted({**known, **rows}.items())), indent=1)
            path.write_text(text + "\n", encoding="utf-8")


def row(report: pytest.TestReport) -> dict[str, object]:
    import torch

    commit = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    return {
        "outcome": report.outcome,
        "counts": [value for name, value in report.user_properties if name == "count"],
        "seconds": round(report.duration, 1),
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
