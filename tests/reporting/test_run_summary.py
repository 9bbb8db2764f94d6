"""The one page of all runs: claims are checked against figures, text is no markup, a browser reads it offline."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_retro.cli.main import main
from megatron_retro.config.evaluation import ReportConfig
from megatron_retro.config.toml_files import render_toml
from megatron_retro.errors import ConfigError
from megatron_retro.reporting.run_page import write_report
from megatron_retro.reporting.run_summary import write_run_summary
from megatron_retro.reporting.summary_checks import summary_checks
from megatron_retro.reporting.summary_inputs import read_summary_inputs
from megatron_retro.runtime.events import EventLog, read_events
from megatron_retro.runtime.statistics import Interval
from megatron_retro.testing.browser import Browser, missing_browser
from megatron_retro.testing.tiny_corpus import write_tiny_corpus
from tests.faults.injection import KINDS, damaged


def records(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def answer(text: str, ended: bool) -> dict[str, Any]:
    reason = "stop" if ended else "length"
    neighbors = [{"id": 1, "text": "<b>a neighbour</b>", "distance": 0.5}]
    chunks = [{"query": "<i>asked</i>", "query_start": 0, "query_stop": 4, "neighbors": neighbors}]
    return {"prompt": "<script>alert(1)</script>", "text": text, "finish_reason": reason, "chunks": chunks}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("summary")
    corpus = write_tiny_corpus(folder / "corpus")
    settings = corpus.settings(train_iters=40, eval_iters=4, save=str(folder / "retro"), split="60,40,0")
    recipe = folder / "retro.toml"
    recipe.write_text(render_toml(settings))
    assert main(["pretrain", "--config", str(recipe)]) == 0
    return folder / "retro"


def config(folder: Path, tuned: bool = True) -> ReportConfig:
    return ReportConfig(
        report_texts=("with=" + records(folder / "text.jsonl", answer("some text", True)),),
        report_answers=(
            "before=" + records(folder / "before.jsonl", answer("no end", False)),
            "after=" + records(folder / "after.jsonl", answer("It is so.", tuned)),
        ),
        report_questions=records(folder / "questions.jsonl", {"question": "What is it?", "answers": ["So."]}),
        report_stages=records(
            folder / "stages.jsonl", {"stage": "train", "seconds": 70}, {"stage": "train", "seconds": 1}
        ),
    )


def test_claims_follow_the_figures(run: Path, tmp_path: Path) -> None:
    """What the log measured decides; a log that says otherwise makes the claim not seen."""
    inputs = read_summary_inputs([run], config(tmp_path))
    _, health = inputs.runs[0][1].health[-1]
    excess = cast(dict[str, Interval], health.excess)
    for low, met in ((0.001, True), (-0.001, False)):
        excess["random"] = replace(excess["random"], low=low)
        found = {one.seen.split()[0]: one.met for one in summary_checks(inputs)}
        assert found["random"] is met
    excess["none"] = replace(excess["none"], low=-1.0)
    assert [one.met for one in summary_checks(inputs)] == [False, False, True]
    untuned = read_summary_inputs([run], config(tmp_path, tuned=False))
    assert not summary_checks(untuned)[-1].met and summary_checks(untuned)[-1].line.startswith("NOT SEEN")


@pytest.mark.parametrize(("random_low", "verdict"), [(0.001, "Yes: on files"), (-0.001, "Not clearly: on files")])
def test_the_verdict_is_that_of_the_intervals(run: Path, tmp_path: Path, random_low: float, verdict: str) -> None:
    """A reader who knows no nats gets the change of perplexity; one doubtful interval is enough for no verdict."""
    changed = tmp_path / "retro"
    changed.mkdir()
    log = EventLog(changed / "events.jsonl")
    for event in read_events(run / "events.jsonl"):
        if event["event"] == "evaluation":
            event["facts"]["excess"] |= {"none": [0.02, 0.01, 0.03], "random": [0.01, random_low, 0.03]}
        log.write(**{name: value for name, value in event.items() if name != "time"})
    log.close()
    (changed / "config.toml").write_bytes((run / "config.toml").read_bytes())
    write_run_summary([changed], config(tmp_path), tmp_path / "summary.html")
    text = (tmp_path / "summary.html").read_text(encoding="utf-8")
    assert verdict in text and "perplexity rises by 2.02 % without" in text and "rises by 1.01 % with random" in text
    assert text.count("<rect") >= 3, "measured once: bars with their bounds, no line through one point"


def test_a_diverged_run_has_its_pages(run: Path, tmp_path: Path) -> None:
    """What is not finite is null in the log, a gap in plots, and no reason to believe a claim."""
    diverged = tmp_path / "retro"
    diverged.mkdir()
    log = EventLog(diverged / "events.jsonl")
    for event in read_events(run / "events.jsonl"):
        if event["event"] == "step":
            event["gradient_norm"] = math.inf
        if event["event"] == "evaluation":
            event["loss"] = math.nan
            event["facts"]["excess"] = dict.fromkeys(event["facts"]["excess"], [math.nan] * 3)
        log.write(**{name: value for name, value in event.items() if name != "time"})
    log.close()
    (diverged / "config.toml").write_bytes((run / "config.toml").read_bytes())
    text = write_report(diverged).read_text(encoding="utf-8")
    assert "Retrieval health" in text and '="nan' not in text
    checked = write_run_summary([diverged], config(tmp_path), tmp_path / "summary.html")
    assert [one.met for one in checked] == [False, False, True]


@pytest.mark.skipif(missing_browser() is not None, reason=str(missing_browser()))
def test_the_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_run_summary([run], config(tmp_path), path)
    text = path.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<b>a neighbour" not in text and "http://" not in text
    with Browser() as browser:
        browser.open(path.as_uri())
        heads = browser.run("return [...document.querySelectorAll('h2')].map(one => one.textContent)")
        for head in ("What was trained", "Curves", "Retrieval health", "Neighbours", "Text", "Answers"):
            assert head in heads
        assert browser.run("return document.querySelectorAll('mark').length") > 0
        assert "1m10s" in browser.run("return document.body.textContent")
        unnamed = "return [...document.querySelectorAll('svg')].filter(one => !one.getAttribute('aria-label')).length"
        assert browser.run(unnamed) == 0
        assert browser.run("return performance.getEntriesByType('resource').length") == 0
        assert [entry for entry in browser.log() if entry["level"] == "SEVERE"] == []


def test_the_verb_says_what_was_seen(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--report-output", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().err
    assert printed.count("than with") == 2 and "seen" in printed.lower() and (tmp_path / "page.html").is_file()


def test_damaged_logs_and_results_end_in_a_sentence(
    run: Path, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """Each file of a run and of an evaluation that a report reads, damaged at random: a page or one named error."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    measure = ["evaluate", "perplexity", "--load", str(folder), "--eval-output", str(folder / "evaluation")]
    assert main(measure) == 0
    words = ["report", str(folder), "--report-output", str(tmp_path / "page.html")]
    assert main(words) == 0
    files = sorted(path for path in folder.rglob("*.json*") if path.is_file())
    dice = random.Random(18)
    for _ in range(count(12, 300)):
        path, kind = dice.choice(files), dice.choice(KINDS)
        content = path.read_bytes()
        after = damaged(content, kind, dice)
        path.unlink() if after is None else path.write_bytes(after)
        code = main(words)
        path.write_bytes(content)
        assert code in (0, 2), (path, kind, after)


def test_files_of_other_prompts_are_refused(run: Path, tmp_path: Path) -> None:
    one = records(tmp_path / "one.jsonl", answer("a", True))
    two = records(tmp_path / "two.jsonl", answer("a", True), answer("b", True))
    with pytest.raises(ConfigError, match="different prompts"):
        read_summary_inputs([run], ReportConfig(report_answers=(f"before={one}", f"after={two}")))
    asked = records(tmp_path / "asked.jsonl", *[{"question": "What?", "answers": ["So."]}] * 2)
    with pytest.raises(ConfigError, match="2 questions, 1 answers"):
        read_summary_inputs([run], ReportConfig(report_answers=(f"before={one}",), report_questions=asked))
    with pytest.raises(ConfigError, match="NAME=FILE"):
        read_summary_inputs([run], ReportConfig(report_texts=(one,)))
