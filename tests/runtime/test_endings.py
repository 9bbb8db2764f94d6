"""What a launcher keeps for a rank that does not listen yet."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_retro.runtime.endings import FOLDER_VARIABLE, early_stop


@pytest.mark.parametrize(("content", "found"), [("USR1 node3\n", signal.SIGUSR1), ("", None), ("HUH node3\n", None)])
def test_a_stop_that_came_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, found: signal.Signals | None
) -> None:
    """An empty file is all that a full disk takes."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert early_stop() is None
    (tmp_path / "stop").write_text(content)
    assert early_stop() == found
