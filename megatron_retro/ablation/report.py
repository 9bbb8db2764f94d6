"""A study as a text table, raw results and one HTML page; what is unfinished says so, everywhere."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from megatron_retro.ablation.comparison import Configuration, Difference, configurations, difference
from megatron_retro.ablation.grid import SEED, Axis
from megatron_retro.ablation.results import Result, read_result
from megatron_retro.ablation.running import Study
from megatron_retro.artifacts.files import write_file
from megatron_retro.reporting.html import facts, page, paragraph, preformatted, section, table
from megatron_retro.reporting.plots import Series, bars, line_plot
from megatron_retro.runtime.console import readable_seconds, render_table
from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import json_text

RESULTS, PAGE = "study.json", "report.html"
_CURVE_POINTS = 120
_ROOM = 60  # letters that the names of a plot may take together
_LINES = 6
_COLUMNS = (
    ("loss", "held-out loss"),
    ("difference", "minus baseline"),
    ("documents", "95% over documents"),
    ("seeds", "95% over seeds"),
    ("none", "no neighbours cost"),
    ("random", "random neighbours cost"),
    ("gate", "chunks that read"),
    ("shortage", "rows short of k"),
    ("parameters", "parameters"),
    ("operations", "operations"),
    ("seconds", "time per run"),
    ("state", "runs"),
)


def read_results(study: Study) -> list[Result]:
    """All runs as they stand."""
    return [read_result(cell, study.directory(cell)) for cell in study.cells]


def write_study(study: Study, title: str, axes: Sequence[Axis]) -> str:
    """Write raw results and the page; returns the table."""
    results = read_results(study)
    groups = configurations(results)
    header, rows = summary_rows(groups, axes)
    raw = {"title": title, "verb": study.verb, "runs": [result.raw() for result in results]}
    write_file(study.output / RESULTS, json_text(raw, indent=1) + "\n")
    write_file(study.output / PAGE, render(study, title, axes, results))
    return render_table(header, rows)


def summary_rows(
    groups: Sequence[Configuration], axes: Sequence[Axis]
) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """One row per configuration; columns that no row fills are left out."""
    names = [axis.name for axis in axes if axis.name != SEED]
    filled = [_cells(group, difference(group, groups[0]), group is groups[0]) for group in groups]
    kept = [key for key, _ in _COLUMNS if any(cells[key] for cells in filled)]
    titles = dict(_COLUMNS)
    header = (*names, *(titles[key] for key in kept))
    rows: list[tuple[object, ...]] = [
        (*group.labels, *(cells[key] for key in kept)) for group, cells in zip(groups, filled, strict=True)
    ]
    return header, rows


def render(study: Study, title: str, axes: Sequence[Axis], results: Sequence[Result]) -> str:
    """The page."""
    groups = configurations(results)
    finished = sum(result.finished for result in results)
    header, rows = summary_rows(groups, axes)
    head = {"runs": len(results), "finished": finished, "configurations": len(groups)} | _overhead(results)
    state = [] if finished == len(results) else [paragraph(_unfinished_words(results), "bad")]
    parts = [
        facts(head),
        *state,
        section("Configurations", table(header, rows), paragraph(_READING, "soft"), *_findings(groups)),
        section("Plots", *_loss_plots(groups, axes), *_curves(groups)),
        section("Runs", table(("run", "state", "step", "held-out loss", "time", "what it said"), _run_rows(results))),
        section("Commands", preformatted("\n".join(shlex.join(study.command(cell)) for cell in study.cells))),
    ]
    return page(title, parts, summary=f"{study.verb}: {', '.join(axis.name for axis in axes)} varied")


_READING = (
    "The first configuration is the baseline. Losses are nats per token, means over finished seeds; a difference is "
    "taken between runs of one seed. Two intervals: over held-out documents (each read by both models; under all "
    "seeds together; lines on bars and bands) and over seeds (Student's t; "
    "each seed is a dot beside its line). 'No neighbours cost' and 'random neighbours "
    "cost' are what the same model loses without its real neighbours. 'Rows short of k' is the share of training "
    "chunks with fewer than k legal neighbours in their row of the table. Each interval is one of 95 % for itself: of "
    "twenty comparisons between equals, one is clear by chance."
)


def _cells(group: Configuration, against: Difference | None, is_baseline: bool) -> dict[str, str]:
    finished = group.finished
    loss = group.loss()
    known = finished[0].facts if finished else None
    parameters = None if known is None else known.parameters
    shortage, rate, operations = group.shortage(), group.gate_rate(), group.operations()
    seconds = [result.outcome.seconds for result in finished if result.outcome is not None]
    compared = against is not None and not is_baseline
    return {
        "loss": "" if loss is None else f"{loss:.4f}",
        "difference": "" if against is None else "baseline" if is_baseline else f"{against.mean:+.4f}",
        "documents": _bounds(against.over_documents) if compared and against is not None else "",
        "seeds": _bounds(against.over_seeds) if compared and against is not None else "",
        "none": _interval(group.excess("none")),
        "random": _interval(group.excess("random")),
        "gate": "" if rate is None else f"{rate:.1%}",
        "shortage": "" if shortage is None else f"{shortage:.2%}",
        "parameters": "" if parameters is None else f"{parameters:,}",
        "operations": "" if operations is None else f"{operations:.3g}",
        "seconds": readable_seconds(sum(seconds) / len(seconds)) if seconds else "",
        "state": group.state,
    }


def _bounds(value: Interval | str) -> str:
    return value if isinstance(value, str) else f"[{value.low:+.4f}, {value.high:+.4f}]"


def _interval(value: Interval | None) -> str:
    return "" if value is None else str(value)


def _overhead(results: Sequence[Result]) -> dict[str, str]:
    """What processes cost beside their steps and evaluations: start, data, checkpoints."""
    done = [
        (result.outcome.seconds, result.training_seconds)
        for result in results
        if result.outcome and result.training_seconds
    ]
    whole, training = sum(one for one, _ in done), sum(one for _, one in done)
    return (
        {"time of ended runs": readable_seconds(whole), "of it steps and evaluations": f"{training / whole:.1%}"}
        if (whole)
        else {}
    )


def _unfinished_words(results: Sequence[Result]) -> str:
    left = [result for result in results if not result.finished]
    return f"{len(left)} of {len(results)} runs are not finished: " + "; ".join(
        f"{result.cell.name}: {result.state}" for result in left
    )


def _findings(groups: Sequence[Configuration]) -> list[str]:
    """One sentence per configuration that has run beside the first."""
    sentences = []
    for group in groups[1:]:
        found = difference(group, groups[0])
        if found is not None and not math.isfinite(found.mean):
            words = f"{group.name}: its loss or that of {groups[0].name} is no number: a run diverged."
            sentences.append(paragraph(words, "bad"))
        elif found is not None:
            better = "better" if found.mean < 0 else "worse"
            verdict = f"{better} than {groups[0].name}" if found.clear else f"not told apart from {groups[0].name}"
            sentences.append(paragraph(f"{group.name}: {verdict}, {found.mean:+.4f}: {found.words}."))
    return sentences


def _loss_plots(groups: Sequence[Configuration], axes: Sequence[Axis]) -> list[str]:
    """Differences along a single numeric axis as a line, otherwise as bars; only what is finished."""
    varied = [axis for axis in axes if axis.name != SEED]
    compared = [(group, found) for group in groups[1:] if (found := difference(group, groups[0])) is not None]
    if not compared:
        return [paragraph("No configuration can be compared with the baseline yet.", "soft")]
    places = _numbers([group.labels[0] for group in groups]) if len(varied) == 1 else None
    if places is None:
        return [_bars(groups, compared)]
    at = {group.labels: place for group, place in zip(groups, places, strict=True)}
    points = [(places[0], (0.0, 0.0, 0.0))]  # the baseline is a difference of exactly zero
    points += [(at[group.labels], (found.mean, *_ends(found))) for group, found in compared]
    return [_line(varied[0].name, sorted(points))]


def _line(axis: str, points: Sequence[tuple[float, tuple[float, float, float]]]) -> str:
    across = [place for place, _ in points]
    means, lows, highs = ([bounds[part] for _, bounds in points] for part in range(3))
    log = min(across) > 0 and max(across) / min(across) >= 8
    line = Series("difference", across, means, lows, highs)
    title = f"Held-out loss minus that of the baseline, against {axis}"
    return line_plot([line], title=title, x_label=axis, y_label="nats per token", log_x=log)


def _bars(groups: Sequence[Configuration], compared: Sequence[tuple[Configuration, Difference]]) -> str:
    names = _short_names(groups)
    by_row = "" if names[0] == groups[0].name else " (numbers are rows of the table)"
    return bars(
        [names[groups.index(group)] for group, _ in compared],
        [found.mean for _, found in compared],
        title=f"Held-out loss minus that of {groups[0].name}{by_row}",
        y_label="nats per token",
        bounds=[_ends(found) for _, found in compared],
        dots=[found.by_seed if len(found.by_seed) > 1 else () for _, found in compared],
    )


def _ends(found: Difference) -> tuple[float, float]:
    """The interval over documents, for plots; not a number where there is none."""
    one = found.over_documents
    return (one.low, one.high) if isinstance(one, Interval) else (math.nan, math.nan)


def _numbers(labels: Sequence[str]) -> list[float] | None:
    try:
        return [float(label) for label in labels]
    except ValueError:
        return None


def _short_names(groups: Sequence[Configuration]) -> list[str]:
    """Names for a plot; where they would run into each other, the rows of the table."""
    names = [group.name for group in groups]
    return names if sum(map(len, names)) <= _ROOM else [str(row) for row in range(1, len(groups) + 1)]


def _curves(groups: Sequence[Configuration]) -> list[str]:
    """Held-out loss during the runs of the first seed; none with fewer than two evaluations."""
    series = []
    for name, group in zip(_short_names(groups), groups, strict=True):
        evaluations = group.results[0].evaluations[-_CURVE_POINTS:]
        if len(evaluations) > 1:
            steps = [float(record.step) for record in evaluations]
            series.append(Series(name, steps, [record.loss for record in evaluations]))
    title = "Held-out loss while training (first seed)"
    return [
        line_plot(series[first : first + _LINES], title=title, x_label="step", y_label="nats per token")
        for first in range(0, len(series), _LINES)
    ]


def _run_rows(results: Sequence[Result]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for result in results:
        loss = f"{result.loss:.4f}" if result.evaluations and math.isfinite(result.loss) else ""
        seconds = "" if result.outcome is None else readable_seconds(result.outcome.seconds)
        message = "" if result.outcome is None else result.outcome.message
        rows.append((result.cell.name, result.state, result.step, loss, seconds, message))
    return rows
