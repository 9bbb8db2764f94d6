"""The inspector's page, in a real browser: complete, searchable, marked right, and asking for nothing from outside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_retro.cli.main import main
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.reporting.neighbors import shared_runs
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.testing.browser import Browser, missing_browser
from megatron_retro.testing.corpora import small_hugging_face
from megatron_retro.testing.retrieval_projects import project_settings, write_corpus
from megatron_retro.testing.tiny_models import random_model, tiny_model, tiny_retro


def test_shared_runs_are_found_and_joined() -> None:
    text = [1, 2, 3, 4, 5, 6, 9, 9]
    assert shared_runs(text, [7, 2, 3, 4, 5, 7, 9, 9, 1, 2, 3], 3) == [(1, 5), (8, 11)]
    assert shared_runs(text, [2, 3, 7, 4, 5], 3) == []
    assert shared_runs(text, [1, 2], 3) == []


def documents() -> list[list[int]]:
    """A line that comes back, a tag that must not become HTML, and a document with nothing in common."""
    line = "the quick brown fox jumps over <script>alert(1)</script> it"
    other = "nothing shared here, 0123456789 ABCDEFGHIJ KLMNOP QRSTU"
    return [list((line + " first").encode()), list(("again " + line).encode()), list(other.encode())]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspector")
    corpus = write_corpus(folder / "corpus", documents())
    tasks = ["train", "encode", "merge", "query"]
    build_retrieval(project_settings(folder / "project", [corpus], retro_tasks=tasks))
    assert main(["inspect-neighbors", "--retro-project-dir", str(folder / "project")]) == 0
    return folder / "project" / "report" / "neighbors-corpus.html"


@pytest.mark.skipif(missing_browser() is not None, reason=str(missing_browser()))
def test_the_page_searches_and_marks(page: Path, tmp_path: Path) -> None:
    with Browser() as browser:
        browser.open(page.as_uri())
        total = browser.run("return document.querySelectorAll('article').length")
        assert total == sum(len(one) + 1 for one in documents()) // 16
        assert browser.text("#count") == f"{total} of {total} chunks"
        marked = browser.run("return [...document.querySelectorAll('mark')].map(one => one.textContent).join('')")
        assert "quick" in marked and "brown" in marked and "<script>" in marked
        assert "nothing" not in marked and "0123" not in marked
        browser.type("#find input", "TAGAIN Quick")
        browser.wait_for("document.querySelector('#count').textContent.startsWith('1 of')")
        shown = browser.run(
            "return [...document.querySelectorAll('article:not([hidden])')].map(one => one.textContent)"
        )
        assert all("tagain" in text and "quick" in text for text in shown)
        browser.clear("#find input")
        assert browser.run("return performance.getEntriesByType('resource').length") == 0
        assert [entry for entry in browser.log() if entry["level"] == "SEVERE"] == []
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_model_shows_what_it_reads(page: Path, tmp_path: Path) -> None:
    """Of each neighbour: shades under its tokens, but for the first, and what it takes off the loss of what follows."""
    model = tiny_model(vocab_size=257, num_layers=2)
    retro = tiny_retro(retro_chunk_length=16, retro_layers=(2,), retro_num_neighbors=1)
    state, shapes = random_model(model, retro).state_dict(), parameter_shapes(model, retro)
    settings = Settings([model, retro, TokenizerConfig(tokenizer_type="ByteTokenizer")])
    write_checkpoint(tmp_path / "run", settings, shapes, lambda name: state[name][: shapes[name][0]], {})
    output = tmp_path / "read.html"
    flags = ["--retro-project-dir", str(page.parent.parent), "--inspect-output", str(output)]
    assert main(["inspect-neighbors", *flags, "--inspect-model", str(tmp_path / "run")]) == 0
    text = output.read_text(encoding="utf-8")
    worth = [float(one) for one in re.findall(r"worth ([+-]\d+\.\d\d) nats", text)]
    assert worth and any(worth)
    shown = text.count("<li>")
    assert text.count('<span class="read-5"') >= len(worth) and shown >= len(worth)
    assert "worth" not in page.read_text(encoding="utf-8").split("<main>")[1]


def test_a_model_of_another_tokenizer_is_refused(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer").mkdir()
    vocabulary = small_hugging_face(tmp_path / "tokenizer").vocab_size
    model = tiny_model(vocab_size=vocabulary, num_layers=2)
    retro = tiny_retro(retro_chunk_length=16, retro_layers=(2,), retro_num_neighbors=1)
    state, shapes = random_model(model, retro).state_dict(), parameter_shapes(model, retro)
    tokenizer = TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer/tokenizer.json"))
    settings = Settings([model, retro, tokenizer])
    write_checkpoint(tmp_path / "run", settings, shapes, lambda name: state[name][: shapes[name][0]], {})
    flags = ["--retro-project-dir", str(page.parent.parent), "--inspect-output", str(tmp_path / "read.html")]
    words = ["inspect-neighbors", *flags, "--inspect-model", str(tmp_path / "run")]
    assert main(words) == 2
    assert "another tokenizer than the model's" in capsys.readouterr().err
    assert main([*words, "--allow-tokenizer-mismatch"]) == 0


def test_text_of_the_corpus_is_no_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text.split("<article>", 1)[1].split("</main>")[0]
    assert "http://" not in text and "https://" not in text


def test_a_foreign_corpus_is_refused(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_corpus(tmp_path / "other", [[1] * 50])
    project = str(page.parent.parent)
    assert main(["inspect-neighbors", "--retro-project-dir", project, "--retro-query-corpus", f"corpus={other}"]) == 2
    assert "belongs to another corpus" in capsys.readouterr().err
