"""`report RUN... --report-output PAGE`: one page for someone who has never seen the project: what was trained, and what
retrieval did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TypeAlias

from megatron_retro.artifacts.files import write_file
from megatron_retro.config.evaluation import ReportConfig
from megatron_retro.config.settings import Settings
from megatron_retro.reporting.html import facts, page, paragraph, preformatted, section, table
from megatron_retro.reporting.neighbors import ATTENTION_STYLE, Read, neighbor_section
from megatron_retro.reporting.perplexity_page import leakage_sections
from megatron_retro.reporting.plots import Series, line_plot
from megatron_retro.reporting.retrieval_sections import health_sections
from megatron_retro.reporting.run_page import thinned, write_report
from megatron_retro.reporting.summary_checks import Check, summary_checks
from megatron_retro.reporting.summary_inputs import GeneratedText, SummaryInputs, read_summary_inputs
from megatron_retro.runtime.console import readable_seconds, say
from megatron_retro.runtime.run_log import CONFIG
from megatron_retro.runtime.statistics import Interval

ReaderOf: TypeAlias = Callable[[Path], Read | None]  # the model of a run, if it is to read its neighbours

_CURVE_POINTS = 60  # means of stretches: single steps are noise
_STYLE = """
td:first-child { overflow-wrap: anywhere; } /* names of functions in questions would push answers off the page */
"""


def report(settings: Settings, names: Sequence[str], reader_of: ReaderOf = lambda run: None) -> None:
    """Write the page of each run, or with --report-output the one page of all."""
    config, runs = settings[ReportConfig], [Path(name) for name in names]
    if config.report_output is None:
        for run in runs:
            say(f"wrote {write_report(run, reader_of(run))}")
        return
    for one in write_run_summary(runs, config, Path(config.report_output), reader_of):
        say(one.line)
    say(f"wrote {config.report_output}")


def write_run_summary(
    runs: list[Path], config: ReportConfig, path: Path, reader_of: ReaderOf = lambda run: None
) -> list[Check]:
    """Write the page; returns what should be seen with what was."""
    inputs = read_summary_inputs(runs, config)
    checked = summary_checks(inputs)
    parts = [
        _verdict(inputs),
        _expected(checked),
        _trained(inputs),
        _curves(inputs),
        *_of_retro(inputs, reader_of),
        *_quality(inputs),
        *_texts(inputs),
        *_answers(inputs),
        *_stages(inputs),
    ]
    summary = "What was trained, what retrieval did for it, and what you should see; everything here was measured here."
    write_file(path, page("Does retrieval help?", parts, summary=summary, style=_STYLE + ATTENTION_STYLE))
    return checked


def _verdict(inputs: SummaryInputs) -> str:
    if inputs.retro is None:
        return paragraph("No run here was measured with and without its neighbours.", "soft")
    run, log = inputs.retro
    _, health = log.health[-1]
    none, random = (health.excess[name] for name in ("none", "random"))
    measured = (
        f"on files that {run.name} never saw, its perplexity {_rise(none)} without the passages that were retrieved "
        f"for them, and {_rise(random)} with random passages in their place"
    )
    helps = none.above_zero and random.above_zero
    words = (
        f"Yes: {measured}. Both are clear of zero, so the content of the passages helps."
        if helps
        else f"Not clearly: {measured}. Not both are above zero beyond doubt, so it may be chance, or no help at all."
    )
    shown: dict[str, object] = {"loss with its neighbours": health.losses["real"].mean}
    shown |= {"with none, nats per token": str(none), "with random ones, nats per token": str(random)}
    how = (
        "The Retro reads, beside its text, passages of the training files that resemble what it read last: its "
        "neighbours. The same trained model predicts the same held-out text again with its neighbours taken away, and "
        "with random ones; what gets worse is what retrieval did. Perplexity is e to the power of the loss: among how "
        "many equally likely tokens a guess would be as hard. Brackets are 95 % intervals over held-out documents."
    )
    return paragraph(words, "good" if helps else "bad") + facts(shown) + paragraph(how)


def _rise(cost: Interval) -> str:
    """The change of perplexity that is a change of loss."""
    change = 100 * math.expm1(cost.mean)
    return f"{'rises' if change > 0 else 'falls'} by {abs(change):.2f} %" if math.isfinite(change) else "is unknown"


def _expected(checked: list[Check]) -> str:
    rows = [(one.claim, one.seen, "seen" if one.met else "NOT SEEN") for one in checked]
    return section("What you should see, and what was seen", table(("you should see that", "measured here", ""), rows))


def _trained(inputs: SummaryInputs) -> str:
    rows = [
        (
            run.name,
            log.facts.parameters,
            len(log.steps),
            log.steps[-1].tokens if log.steps else 0,
            readable_seconds(log.training_seconds),
            f"{log.evaluations[-1].loss:.4f}" if log.evaluations else "",
        )
        for run, log in inputs.runs
    ]
    header = ("run", "parameters", "steps", "tokens", "training", "held-out loss")
    caption = (
        "Each run goes on from the one before it, so most of what a later run is better by is more training: what "
        "retrieval did is said above. Losses of tuning are over replies and not comparable."
    )
    return section("What was trained", table(header, rows, caption=caption))


def _curves(inputs: SummaryInputs) -> str:
    series = [Series(run.name, *thinned(*log.curve("loss"), _CURVE_POINTS)) for run, log in inputs.runs if log.steps]
    return section("Curves", line_plot(series, title="Training loss", x_label="step", y_label="nats per token"))


def _of_retro(inputs: SummaryInputs, reader_of: ReaderOf) -> list[str]:
    if inputs.retro is None:
        return []
    run, log = inputs.retro
    return [*health_sections(log), *leakage_sections(run), *neighbor_section(run / CONFIG, reader_of(run))]


def _quality(inputs: SummaryInputs) -> list[str]:
    rows = [
        (name, int(depth), one.recall, f"{one.low:.3f} to {one.high:.3f}", quality.closeness.mean_overlap)
        for name, quality in (inputs.quality.tables if inputs.quality else {}).items()
        for depth, one in quality.recall.items()
    ]
    header = ("table", "neighbours", "recall", "95 %", "tokens shared with the nearest")
    return [section("How good the neighbours are", table(header, rows))] if rows else []


def _texts(inputs: SummaryInputs) -> list[str]:
    parts = []
    for name, texts in inputs.texts.items():
        for one in texts:
            parts.append(f"<h3>{escape(name)}</h3>" + preformatted(one.prompt + one.text))
            parts += _read_by(one)
    return [section("Text", *parts)] if parts else []


def _read_by(text: GeneratedText) -> list[str]:
    rows = [
        (chunk.query, number, neighbor.text)
        for chunk in text.chunks
        for number, neighbor in enumerate(chunk.neighbors, 1)
    ]
    return [table(("chunk", "neighbour", "its text"), rows, caption="What it read")] if rows else []


def _answers(inputs: SummaryInputs) -> list[str]:
    if not inputs.answers:
        return []
    prompts = [one.prompt for one in next(iter(inputs.answers.values()))]
    columns = [[one.question for one in inputs.questions] or prompts]
    columns += [[one.text.strip() for one in texts] for texts in inputs.answers.values()]
    columns += [[one.answers[0] for one in inputs.questions]] if inputs.questions else []
    header = ("question", *inputs.answers, *(("the docstring says",) if inputs.questions else ()))
    caption = (
        "Questions about held-out files; neither their text nor their questions were trained on. "
        "A model of a few million parameters learns the form of an answer, not its content."
    )
    return [section("Answers", table(header, list(zip(*columns, strict=True)), caption=caption))]


def _stages(inputs: SummaryInputs) -> list[str]:
    longest: dict[str, float] = {}
    for stage in inputs.stages:  # a stage that was done before takes no time when all are started again
        longest[stage.stage] = max(longest.get(stage.stage, 0.0), stage.seconds)
    rows = [(name, readable_seconds(seconds)) for name, seconds in longest.items()]
    total = readable_seconds(sum(longest.values()))
    return [section("Time of each stage", table(("stage", "time"), [*rows, ("all", total)]))] if rows else []
