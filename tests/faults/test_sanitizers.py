"""The C++ that reads files and arrays, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.faults.fuzz_seeds import seeds
from tests.faults.fuzzing import LIBRARIES, Target, build, compiler
from tests.faults.injection import ROOT

BELIEVED = "pointer > num_tokens * item_bytes"  # in chunk_database.cpp: where a sequence of an .idx begins

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not shutil.which(compiler()[0]), reason="no C++ compiler"),
    pytest.mark.skipif(not sysconfig.get_config_var("Py_ENABLE_SHARED"), reason="no shared library of Python"),
]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    return build(tmp_path_factory.mktemp("fuzz"))


def test_committed_inputs_are_answered_or_refused(targets: list[Target], tmp_path: Path) -> None:
    for target in targets:
        done = target.run(*target.inputs(tmp_path / target.name))
        assert done.returncode == 0, done.stderr[-4000:]


def test_some_seconds_find_nothing(targets: list[Target], tmp_path: Path) -> None:
    if not compiler()[1]:
        pytest.skip("libFuzzer needs clang")
    first = seeds(tmp_path / "seeds")
    assert set(first) == {target.name for target in targets}
    for target in targets:
        folder = tmp_path / f"inputs-{target.name}/corpus"
        target.inputs(folder)
        (folder / "seed").write_bytes(first[target.name])
        row = target.fuzz(folder, seconds=3)
        assert row["findings"] == 0 and row["executions"], row


def test_a_number_that_is_believed_is_found(tmp_path: Path) -> None:
    """The planted fault: committed inputs lead outside where one check is missing."""
    for folder in ("csrc/host", "tests/faults/fuzz"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    source = tmp_path / "csrc/host/chunk_database.cpp"
    text = source.read_text(encoding="utf-8")
    assert BELIEVED in text
    source.write_text(text.replace(BELIEVED, "false"), encoding="utf-8")
    (gather,) = (target for target in build(tmp_path, tmp_path, {"data": LIBRARIES["data"]}) if target.name == "gather")
    done = gather.run(*gather.inputs(tmp_path / "inputs"))
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
