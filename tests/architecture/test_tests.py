"""`tests/` has the folders of the package, and a few beside them, each for a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_retro"
# Folders that are no package -> what they test.
OTHERS = {
    "architecture": "what every source file and document promises",
    "docs": "commands and figures of the documents",
    "faults": "damage to every artifact, on the path of every consumer",
    "examples": "recipes, studies and the SLURM launcher",
    "results": "outcomes of the long counts, written by `./tests/run.sh --full`",
}


def folders_of_tests() -> list[str]:
    return sorted({str(path.parent.relative_to(ROOT / "tests")) for path in ROOT.glob("tests/*/**/test_*.py")})


@pytest.mark.parametrize("name", folders_of_tests())
def test_a_folder_of_tests_mirrors_a_package(name: str) -> None:
    root = ROOT if name.split("/")[0] in OTHERS else PACKAGE
    assert (root / name).is_dir() or name in ("architecture", "faults"), f"tests/{name}: no package of this name"


def test_every_other_folder_is_used() -> None:
    assert {name for name in OTHERS if not (ROOT / "tests" / name).is_dir()} == set()
