"""What the documents promise: decisions in one form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LABELS = ["Question", "Choice", "Measured", "Would change it"]


def decisions() -> dict[str, str]:
    parts = re.split(r"^### (.+)$", (ROOT / "docs" / "decisions.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("title", decisions())
def test_a_decision_is_dated_and_has_its_four_lines(title: str) -> None:
    text = decisions()[title]
    assert re.match(r"\n\n20\d\d-\d\d-\d\d\n\n- \*\*", text), "the date stands alone under the title"
    assert re.findall(r"^- \*\*(.+?):\*\*", text, flags=re.MULTILINE) == LABELS
