"""A study as a text table and one HTML page; what is unfinished says so, everywhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_retro.reporting.html import facts, page, paragraph, preformatted, section, side_by_side, table
from megatron_retro.reporting.plots import Series, bars, line_plot
from megatron_retro.runtime.console import readable_seconds
from megatron_retro.runtime.statistics import Interval

_ROOM = 60  # letters that the names of a plot may take together
_LINES = 6
_COLUMNS = {
    "loss": "held-out loss",
    "difference": "minus baseline",
    "documents": "95% over documents",
    "seeds": "95% over seeds",
    "none": "no neighbours cost",
    "random": "random neighbours cost",
    "gate": "chunks that read",
    "shortage": "rows short of k",
    "parameters": "parameters",
    "operations": "operations",
    "seconds": "time per run",
    "state": "runs",
}
_READING = (
    "The first configuration is the baseline. Losses are nats per token, means over finished seeds; a difference is "
    "taken between runs of one seed. Two intervals: over held-out documents (each read by both models; under all "
    "seeds together; lines on bars and bands) and over seeds (Student's t; "
    "each seed is a dot beside its line). 'No neighbours cost' and 'random neighbours "
    "cost' are what the same model loses without its real neighbours. 'Rows short of k' is the share of training "
    "chunks with fewer than k legal neighbours in their row of the table. Each interval is one of 95 % for itself: of "
    "twenty comparisons between equals, one is clear by chance."
)


@dataclass(frozen=True)
class Difference:
    """A configuration minus the baseline, on the seeds that both finished; why an interval is absent is in words."""

    by_seed: tuple[float, ...]
    over_documents: Interval | str
    over_seeds: Interval | str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed)

    @property
    def clear(self) -> bool:
        """Whether an interval exists and each that does is on one side of zero."""
        return {one.side for _, one in self._intervals if isinstance(one, Interval)} in ({1}, {-1})

    @property
    def words(self) -> str:
        """Which of the intervals are clear of zero, and why one is missing."""
        return ", ".join(
            f"{'clear' if one.side else 'not clear'} over {name}" if isinstance(one, Interval) else one
            for name, one in self._intervals
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """Those over documents, for plots; not a number where there are none."""
        one = self.over_documents
        return (one.low, one.high) if isinstance(one, Interval) else (math.nan, math.nan)

    @property
    def _intervals(self) -> tuple[tuple[str, Interval | str], ...]:
        return ("documents", self.over_documents), ("seeds", self.over_seeds)


@dataclass(frozen=True)
class ConfigurationFigures:
    """All runs of one configuration; what was not measured is None. `curve` is of the first seed."""

    labels: tuple[str, ...]
    state: str
    loss: float | None
    against: Difference | None
    excess: Mapping[str, Interval | None]
    gate_rate: float | None
    shortage: float | None
    parameters: int | None
    operations: float | None
    seconds: float | None
    curve: tuple[Sequence[float], Sequence[float]]

    @property
    def name(self) -> str:
        return ", ".join(self.labels) or "all"


@dataclass(frozen=True)
class RunFigures:
    """One run; `message` is what it said when it failed."""

    name: str
    state: str
    finished: bool
    step: int
    loss: float | None
    seconds: float | None
    training_seconds: float
    message: str


@dataclass(frozen=True)
class StudyFigures:
    """A study as it stands; the first configuration is the baseline. `varied` are the axes without the seed."""

    title: str
    verb: str
    axes: Sequence[str]
    varied: Sequence[str]
    configurations: Sequence[ConfigurationFigures]
    runs: Sequence[RunFigures]
    commands: Sequence[str]


def summary_rows(study: StudyFigures) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """A header, and one row per configuration; columns that no row fills are left out."""
    filled = [_cells(one, number == 0) for number, one in enumerate(study.configurations)]
    kept = [key for key in _COLUMNS if any(cells[key] for cells in filled)]
    header = (*study.varied, *(_COLUMNS[key] for key in kept))
    return header, [
        (*one.labels, *(cells[key] for key in kept)) for one, cells in zip(study.configurations, filled, strict=True)
    ]


def study_page(study: StudyFigures) -> str:
    """The whole page."""
    left = [run for run in study.runs if not run.finished]
    head = {"runs": len(study.runs), "finished": len(study.runs) - len(left)}
    unfinished = f"{len(left)} of {len(study.runs)} runs are not finished: " + "; ".join(
        f"{run.name}: {run.state}" for run in left
    )
    header, rows = summary_rows(study)
    runs = [
        (run.name, run.state, run.step, _number(run.loss, ".4f"), _time(run.seconds), run.message) for run in study.runs
    ]
    parts = [
        facts({**head, "configurations": len(study.configurations), **_overhead(study.runs)}),
        *([paragraph(unfinished, "bad")] if left else []),
        section("Configurations", table(header, rows), paragraph(_READING, "soft"), *_findings(study.configurations)),
        section("Plots", side_by_side([*_differences(study), *_curves(study.configurations)])),
        section("Runs", table(("run", "state", "step", "held-out loss", "time", "what it said"), runs)),
        section("Commands", preformatted("\n".join(study.commands))),
    ]
    return page(study.title, parts, summary=f"{study.verb}: {', '.join(study.axes)} varied")


def _cells(one: ConfigurationFigures, is_baseline: bool) -> dict[str, str]:
    against = one.against
    compared = None if is_baseline else against
    return {
        "loss": _number(one.loss, ".4f"),
        "difference": "" if against is None else "baseline" if is_baseline else f"{against.mean:+.4f}",
        "documents": "" if compared is None else _bounds(compared.over_documents),
        "seeds": "" if compared is None else _bounds(compared.over_seeds),
        "none": str(one.excess.get("none") or ""),
        "random": str(one.excess.get("random") or ""),
        "gate": _number(one.gate_rate, ".1%"),
        "shortage": _number(one.shortage, ".2%"),
        "parameters": _number(one.parameters, ","),
        "operations": _number(one.operations, ".3g"),
        "seconds": _time(one.seconds),
        "state": one.state,
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else readable_seconds(seconds)


def _bounds(value: Interval | str) -> str:
    return value if isinstance(value, str) else f"[{value.low:+.4f}, {value.high:+.4f}]"


def _overhead(runs: Sequence[RunFigures]) -> dict[str, str]:
    """What processes cost beside their steps and evaluations: start, data, checkpoints."""
    done = [(run.seconds, run.training_seconds) for run in runs if run.seconds is not None and run.training_seconds]
    whole, training = sum(one for one, _ in done), sum(one for _, one in done)
    if not whole:
        return {}
    return {"time of ended runs": readable_seconds(whole), "of it steps and evaluations": f"{training / whole:.1%}"}


def _findings(configurations: Sequence[ConfigurationFigures]) -> list[str]:
    """One sentence per configuration that has run beside the first."""
    base, *others = configurations
    return [paragraph(*_finding(one, one.against, base.name)) for one in others if one.against is not None]


def _finding(one: ConfigurationFigures, found: Difference, baseline: str) -> tuple[str, str]:
    """The sentence, and its kind of paragraph."""
    if not math.isfinite(found.mean):
        return f"{one.name}: its loss or that of {baseline} is no number: a run diverged.", "bad"
    better = "better" if found.mean < 0 else "worse"
    verdict = f"{better} than {baseline}" if found.clear else f"not told apart from {baseline}"
    return f"{one.name}: {verdict}, {found.mean:+.4f}: {found.words}.", ""


def _differences(study: StudyFigures) -> list[str]:
    """Differences along a single numeric axis as a line, otherwise as bars; only what is finished."""
    compared = [(one, one.against) for one in study.configurations[1:] if one.against is not None]
    if not compared:
        return [paragraph("No configuration can be compared with the baseline yet.", "soft")]
    places = _numbers([one.labels[0] for one in study.configurations]) if len(study.varied) == 1 else None
    if places is None:
        return [_bars(study.configurations, compared)]
    at = {one.labels: place for one, place in zip(study.configurations, places, strict=True)}
    points = [(places[0], Interval(0.0, 0.0, 0.0))]  # the baseline is a difference of exactly zero
    points += [(at[one.labels], Interval(found.mean, *found.bounds)) for one, found in compared]
    across, intervals = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    name = study.varied[0]
    return [
        line_plot(
            [Series.with_bounds("difference", across, intervals)],
            title=f"Held-out loss minus that of the baseline, against {name}",
            x_label=name,
            y_label="nats per token",
            log_x=min(across) > 0 and max(across) / min(across) >= 8,
        )
    ]


def _bars(
    configurations: Sequence[ConfigurationFigures], compared: Sequence[tuple[ConfigurationFigures, Difference]]
) -> str:
    names = _short_names(configurations)
    baseline = configurations[0].name
    by_row = "" if names[0] == baseline else " (numbers are rows of the table)"
    return bars(
        [names[configurations.index(one)] for one, _ in compared],
        [found.mean for _, found in compared],
        title=f"Held-out loss minus that of {baseline}{by_row}",
        y_label="nats per token",
        bounds=[found.bounds for _, found in compared],
        dots=[found.by_seed if len(found.by_seed) > 1 else () for _, found in compared],
    )


def _numbers(labels: Sequence[str]) -> list[float] | None:
    try:
        return [float(label) for label in labels]
    except ValueError:
        return None


def _short_names(configurations: Sequence[ConfigurationFigures]) -> list[str]:
    """Names for a plot; where they would run into each other, the rows of the table."""
    names = [one.name for one in configurations]
    return names if sum(map(len, names)) <= _ROOM else [str(row) for row in range(1, len(names) + 1)]


def _curves(configurations: Sequence[ConfigurationFigures]) -> list[str]:
    """Held-out loss during the runs of the first seed; none with fewer than two evaluations."""
    named = zip(_short_names(configurations), configurations, strict=True)
    series = [Series(name, *one.curve) for name, one in named if len(one.curve[0]) > 1]
    title = "Held-out loss while training (first seed)"
    return [
        line_plot(series[first : first + _LINES], title=title, x_label="step", y_label="nats per token")
        for first in range(0, len(series), _LINES)
    ]
