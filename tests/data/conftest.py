"""What tests of preprocessing share."""

from __future__ import annotations

import pytest

from megatron_retro.data.preprocessing import appending, job


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few records, so that small inputs make many."""
    monkeypatch.setattr(job, "SMALLEST_BLOCK", 2000)
    monkeypatch.setattr(appending, "APPENDED_BYTES", 4000)
