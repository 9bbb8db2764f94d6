"""The figures of docs/experiments.md are those of the raw results beside them."""

from __future__ import annotations

import runpy
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "experiments"


def test_every_figure_is_drawn_from_what_lies_beside_it() -> None:
    drawn = runpy.run_path(str(FOLDER / "figures.py"))["figures"]()
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(drawn)
    for name, picture in drawn.items():
        assert (FOLDER / f"{name}.svg").read_text() == picture, f"{name}: run python docs/experiments/figures.py"


def test_the_document_shows_every_figure_and_links_every_result() -> None:
    text = (FOLDER.parent / "experiments.md").read_text()
    for path in FOLDER.iterdir():
        if path.suffix in (".svg", ".json"):
            assert f"(experiments/{path.name})" in text, path.name
