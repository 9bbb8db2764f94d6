"""`report RUN`: one self-contained page about a run: curves, health of retrieval, leakage, neighbours, settings."""

from __future__ import annotations

import statistics
from pathlib import Path

from megatron_retro.artifacts.files import write_file
from megatron_retro.reporting.html import facts, page, paragraph, preformatted, section, side_by_side, table
from megatron_retro.reporting.neighbors import ATTENTION_STYLE, Read, neighbor_section
from megatron_retro.reporting.perplexity_page import leakage_sections
from megatron_retro.reporting.plots import Series, bars, line_plot
from megatron_retro.reporting.retrieval_sections import health_sections, use_sections
from megatron_retro.runtime.environment import environment_rows
from megatron_retro.runtime.run_log import CONFIG, RunLog, read_rank_steps, read_run_log

REPORT = "report.html"
_POINTS = 600
_MOST_RANKS = 16


def write_report(run: Path, read: Read | None = None) -> Path:
    """Write the page into the run's directory; `read` shows what the model attends to in its neighbours."""
    log = read_run_log(run)
    parts = [
        _overview(log),
        _curves(log),
        *health_sections(log),
        *use_sections(log),
        *leakage_sections(run),
        *neighbor_section(run / CONFIG, read),
        *_ranks(run),
        _incidents(log),
        section("Configuration", preformatted(_text(run / CONFIG))),
        section("Environment", table(("part", "state"), environment_rows())),
    ]
    path = run / REPORT
    write_file(path, page(f"Run {run.name}", parts, summary=str(run), style=ATTENTION_STYLE))
    return path


def _overview(log: RunLog) -> str:
    shown: dict[str, object] = {
        "steps": len(log.steps),
        "starts": len(log.starts),
        "parameters": log.facts.parameters,
        "processes": log.facts.world_size,
    }
    if log.steps:
        recent = log.steps[-100:]
        tokens = sum(step.positions for step in recent)
        seconds = sum(step.step_seconds for step in recent)
        shown |= {
            "last loss": log.steps[-1].loss,
            "tokens": log.steps[-1].tokens,
            "batch size": log.steps[-1].batch_size,
            "tokens per second": round(tokens / max(seconds, 1e-9)),
            "data wait": f"{sum(step.seconds.get('data', 0.0) for step in recent) / max(seconds, 1e-9):.1%}",
            "memory (MB)": round(log.steps[-1].memory_bytes / 1e6),
        }
    if log.evaluations:
        shown["validation loss"] = log.evaluations[-1].loss
    if log.saves:
        shown["saves"] = f"{len(log.saves)}, last after step {log.saves[-1]}"
    alarms = log.evaluations[-1].alarms if log.evaluations else ()
    return facts(shown) + "".join(paragraph(f"Alarm: {alarm}", "bad") for alarm in alarms)


def _curves(log: RunLog) -> str:
    plots = []
    for name, title in (
        ("loss", "Training loss"),
        ("gradient_norm", "Gradient norm"),
        ("learning_rate", "Learning rate"),
        ("batch_size", "Batch size"),
    ):
        steps, values = thinned(*log.curve(name))
        if name != "batch_size" or len(set(values)) > 1:
            plots.append(line_plot([Series(name, steps, values)], title=title, x_label="step", y_label=title.lower()))
    if log.evaluations:
        line = Series("loss", [record.step for record in log.evaluations], [record.loss for record in log.evaluations])
        plots.append(line_plot([line], title="Validation loss", x_label="step", y_label="loss"))
    return section("Curves", side_by_side([*plots, _time_per_phase(log)]))


def thinned(steps: list[float], values: list[float], points: int = _POINTS) -> tuple[list[float], list[float]]:
    """About so many points at most, each the mean of its stretch."""
    stretch = max(1, len(steps) // points)
    starts = range(0, len(steps), stretch)
    return (
        [steps[min(start + stretch, len(steps)) - 1] for start in starts],
        [statistics.fmean(values[start : start + stretch]) for start in starts],
    )


def _time_per_phase(log: RunLog) -> str:
    totals: dict[str, float] = {}
    for step in log.steps:
        for name, seconds in step.seconds.items():
            totals[name] = totals.get(name, 0.0) + seconds
    count = max(len(log.steps), 1)
    names = sorted(totals, key=lambda name: -totals[name])
    milliseconds = [1000 * totals[name] / count for name in names]
    return bars(names, milliseconds, title="Time of a step", y_label="milliseconds")


def _ranks(run: Path) -> list[str]:
    """Who computes and who waits, slowest first; nothing for a run of one process."""
    by_rank = read_rank_steps(run)
    if not by_rank:
        return []
    figures = [
        (
            rank,
            1000 * statistics.fmean(step.computing_seconds for step in steps),
            1000 * statistics.fmean(step.waiting_seconds for step in steps),
            1000 * statistics.fmean(step.seconds.get("data", 0.0) for step in steps),
            round(steps[-1].memory_bytes / 1e6),
        )
        for rank, steps in by_rank.items()
    ]
    median = statistics.median(computing for _, computing, *_ in figures)
    slowest = sorted(figures, key=lambda row: -row[1])[:_MOST_RANKS]
    rows = [(rank, computing, f"{computing / max(median, 1e-9) - 1:+.0%}", *rest) for rank, computing, *rest in slowest]
    caption = (
        f"The newest steps of {len(figures)} ranks, slowest first, at most {_MOST_RANKS}. Times are milliseconds of a "
        "step. Ranks wait for the slowest of those that do the same work; pipeline stages do different work."
    )
    header = (
        "rank",
        "computing (ms)",
        "against the median",
        "waiting for ranks (ms)",
        "loading data (ms)",
        "memory (MB)",
    )
    return [section("Ranks", table(header, rows, caption=caption))]


def _incidents(log: RunLog) -> str:
    rows = [
        (event["event"], ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("event", "time")))
        for event in log.incidents
    ]
    rows = [("start", f"after step {step}") for step in log.starts] + rows
    return section("What happened", table(("event", "facts"), rows))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else "not there"
