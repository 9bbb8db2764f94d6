"""The page of a run: complete, readable without a script, asking for nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.cli.main import main
from megatron_retro.errors import ArtifactError
from megatron_retro.reporting.run_page import write_report
from megatron_retro.testing.browser import Browser, missing_browser
from megatron_retro.testing.tiny_corpus import TinyCorpus, losses, write_tiny_corpus
from megatron_retro.training.program import pretrain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def trained(corpus: TinyCorpus, run: Path, **more: Any) -> None:
    pretrain(corpus.settings(save=str(run), train_iters=5, **more))


class Page(HTMLParser):
    """Counts what a page holds, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value and "data:" not in value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_with_everything(corpus: TinyCorpus, tmp_path: Path) -> None:
    trained(corpus, tmp_path / "run", eval_iters=1, eval_interval=2)
    page = Page()
    page.feed(write_report(tmp_path / "run").read_text())
    assert page.fetched == []
    assert page.tags.count("svg") >= 7
    for heading in ("Training loss", "Retrieval health", "Neighbours", "What happened", "Configuration", "Environment"):
        assert heading in page.text
    assert "seq_length = 64" in page.text and "neighbour 1" in page.text
    assert f"{losses(tmp_path / 'run')[-1]:.4g}" in page.text
    assert "worth" not in page.text
    with pytest.raises(ArtifactError, match="is no run"):
        write_report(tmp_path)


def test_a_report_can_show_what_the_model_reads(corpus: TinyCorpus, tmp_path: Path) -> None:
    trained(corpus, tmp_path / "run", eval_iters=0)
    trained(corpus, tmp_path / "gpt", eval_iters=0, retro=False)
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "gpt"), "--report-attention"]) == 0
    page = (tmp_path / "run/report.html").read_text()
    worths = [float(found) for found in re.findall(r"neighbour \d+, worth ([+-]\d\.\d\d) nats", page)]
    assert 1 <= len(worths) <= 6 and 'class="read-5"' in page
    assert "worth" not in (tmp_path / "gpt/report.html").read_text()


@pytest.mark.skipif(missing_browser() is not None, reason=str(missing_browser()))
def test_a_browser_shows_the_report_without_asking_for_anything(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Curves have a size and lie in their plots, text does not overflow, nothing fails and nothing is fetched."""
    trained(corpus, tmp_path / "run", eval_iters=1, eval_interval=2, retro_gate_type="adaptive")
    page = write_report(tmp_path / "run")
    with Browser() as browser:
        browser.open(page.as_uri())
        plots = browser.run(
            "return [...document.querySelectorAll('svg')].map(plot => {"
            " const outer = plot.getBoundingClientRect();"
            " const shapes = [...plot.querySelectorAll('path, polyline, circle, rect')];"
            " const lines = shapes.map(shape => shape.getBoundingClientRect());"
            " return {width: outer.width, height: outer.height, shapes: lines.length,"
            "  inside: lines.every(x => x.left >= outer.left - 2 && x.right <= outer.right + 2"
            "   && x.top >= outer.top - 2 && x.bottom <= outer.bottom + 2)}; })"
        )
        wide = browser.run("return document.documentElement.scrollWidth <= window.innerWidth + 1")
        fetched = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
        headings = browser.run("return [...document.querySelectorAll('h1, h2')].map(x => x.innerText)")
        errors = [entry for entry in browser.log() if entry.get("level") == "SEVERE"]
    assert len(plots) >= 7 and all(plot["width"] > 100 and plot["height"] > 50 for plot in plots)
    assert all(plot["shapes"] and plot["inside"] for plot in plots)
    assert wide and fetched == [] and errors == []
    assert {"Retrieval health", "Configuration"} <= set(headings)
