"""Benchmarks say of which versions their figures are, peers included, and judge full sizes only."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, versions

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers" / "peer_packages.py"
pytestmark = pytest.mark.skipif(not PEERS.exists(), reason="needs benchmarks")


def test_the_versions_of_peers_in_their_folder_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "megatron_core-7.8.9.dist-info").mkdir()
    (tmp_path / "megatron_core-7.8.9.dist-info" / "METADATA").write_text("Name: megatron-core\nVersion: 7.8.9\n")
    monkeypatch.setenv("MEGATRON_RETRO_PEERS", str(tmp_path))
    monkeypatch.setattr(sys, "path", [each for each in sys.path if "peers" not in each])
    spec = importlib.util.spec_from_file_location("peer_packages_of_a_test", PEERS)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert versions()["megatron-core"] == "7.8.9"


@pytest.mark.parametrize(("words", "targets"), [([], [1.0, None]), (["--quick"], [None, None])])
def test_quick_figures_have_no_targets(
    words: list[str], targets: list[float | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of other sizes: a target that they miss would say nothing."""
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["some.py", "--json", str(path), *words])
    benchmark_main("", lambda quick: [Figure("seconds", 2.0, "s", 1.0, LOWER), Figure("tokens", 1.0, "")])
    content = json.loads(path.read_text())
    assert [figure["target"] for figure in content["figures"]] == targets
    assert content["complete"] and content["figures"][0]["met"] is (None if words else False)
