"""Whatever a verb writes has the modes that `umask` leaves, whichever library opened the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_retro.cli.main import main
from megatron_retro.testing.processes import exit_code_of
from tests.faults.stages import conversions, preprocessing, write_stages


@pytest.mark.parametrize("mask", [0o077, pytest.param(0o022, marks=pytest.mark.full)], ids=oct)
def test_files_have_the_modes_that_umask_leaves(tmp_path: Path, mask: int, count: Callable[[int, int], int]) -> None:
    stages = write_stages(tmp_path) if count(0, 1) else [preprocessing(tmp_path / "text"), *conversions(tmp_path)]
    for number, stage in enumerate(stages):
        folder = Path(shutil.copytree(stage.ready, tmp_path / f"copy-{number}"))
        before, words = set(folder.rglob("*")), stage.words(folder)

        def run(words: list[str] = words) -> None:
            os.umask(mask)
            assert main(words) == 0

        assert exit_code_of(run) == 0, stage.name
        written = set(folder.rglob("*")) - before
        modes = {path: path.stat().st_mode & 0o777 for path in written}
        wrong = [f"{path}: {mode:o}" for path, mode in modes.items() if mode != (0o666, 0o777)[path.is_dir()] & ~mask]
        assert written and not wrong, (stage.name, wrong)
