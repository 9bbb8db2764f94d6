"""How good neighbour tables are: the figures of `build-retrieval`'s verify stage, their JSON, and their page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.errors import ArtifactError
from megatron_retro.reporting.html import facts, page, paragraph, section, side_by_side, table
from megatron_retro.reporting.plots import Series, histogram, line_plot
from megatron_retro.runtime.strict_json import from_plain


@dataclass(frozen=True)
class Recall:
    """Recall at one depth with its 95 % interval."""

    recall: float
    low: float
    high: float


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, of which there is one more."""

    counts: Sequence[float] = ()
    edges: Sequence[float] = ()


@dataclass(frozen=True)
class Effort:
    """Recall@2 and time of a query at one search effort: lists searched, or efSearch where there are no lists."""

    effort: int
    recall: float
    milliseconds: float

    def to_json(self) -> dict[str, float]:
        """`recall@2` is no name in Python."""
        return {"effort": self.effort, "recall@2": self.recall, "milliseconds": self.milliseconds}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Effort:
        """What `to_json` gave."""
        return cls(int(found["effort"]), float(found["recall@2"]), float(found["milliseconds"]))


@dataclass(frozen=True)
class Audit:
    """Leaks, absences and repetitions in the rows of a table, and how many planted leaks the audit saw."""

    rows: int
    leaks: int
    missing_share: float
    empty_rows_share: float
    repeated: int
    planted_leaks: int
    planted_leaks_seen: int


@dataclass(frozen=True)
class Closeness:
    """How near the two nearest neighbours are, what they share with the query chunk and with what follows it."""

    distance: Histogram
    overlap: Histogram
    successor_run: Histogram
    same_text_share: float
    mean_overlap: float
    successor_run_above_half: float


@dataclass(frozen=True)
class ListBalance:
    """How evenly chunks lie in the inverted lists; an imbalance of 1 is even, K is all in one of K."""

    lists: int
    imbalance: float
    largest: int
    empty: int
    sizes: Histogram


@dataclass(frozen=True)
class IndexFigures:
    """What was searched, and how."""

    chunks: int
    index_str: str
    nprobe: int
    ef_search: int
    by_lists: bool
    on_gpus: bool
    balance: ListBalance | None


@dataclass(frozen=True)
class TableQuality:
    """One neighbour table; `recall` is by depth, `problems` are sentences about what is not sound."""

    rows: int
    saved: int
    sampled: int
    recall_of: str
    recall: Mapping[str, Recall]
    audit: Audit
    closeness: Closeness
    sweep: Sequence[Effort]
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class QualityReport:
    """All tables of a project. `embedders` has a row of figures for each embedder that was compared."""

    recall_floor: float | None
    embedder: str
    index: IndexFigures
    tables: Mapping[str, TableQuality]
    embedders: Sequence[Mapping[str, Any]] = ()
    subject: str = ""


def read_quality(path: Path) -> QualityReport:
    """The report that a verify stage left."""
    try:
        found = from_plain(QualityReport, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no report on neighbour tables", got=repr(error)) from None
    return found


def quality_page(report: QualityReport) -> str:
    """The whole page."""
    parts = [_index_part(report.index)]
    parts += [_table_part(name, quality, report.recall_floor) for name, quality in report.tables.items()]
    if report.embedders:
        parts.append(_embedders_part(report.embedders))
    summary = f"{report.index.chunks:,} chunks, {report.index.index_str}, embedder: {report.embedder}"
    return page("Retrieval quality", parts, summary=summary)


def _embedders_part(rows: Sequence[Mapping[str, Any]]) -> str:
    header = tuple(rows[0])
    return section(
        "Embedders",
        paragraph(
            "Two exact neighbours in a sample of the database per query chunk. What they share with the text that "
            "follows the chunk is what a model can gain."
        ),
        table(header, [tuple(row[name] for name in header) for row in rows]),
    )


def _index_part(index: IndexFigures) -> str:
    method = "query by query, on GPUs" if index.on_gpus else "list by list" if index.by_lists else "query by query"
    shown: dict[str, object] = {
        "chunks": index.chunks,
        "index": index.index_str,
        "lists searched": index.nprobe,
        "efSearch": index.ef_search,
        "method": method,
    }
    balance = index.balance
    if balance is None:
        return section("Index", facts(shown))
    shown |= {"imbalance of lists": balance.imbalance, "largest": balance.largest, "empty": balance.empty}
    return section("Index", facts(shown), _histogram(balance.sizes, "Sizes of inverted lists", "chunks in a list"))


def _table_part(name: str, quality: TableQuality, floor: float | None) -> str:
    audit, close = quality.audit, quality.closeness
    return section(
        f"Table {name}",
        _verdict(quality, floor),
        facts(
            {
                "rows": quality.rows,
                "neighbours per row": quality.saved,
                "missing": f"{audit.missing_share:.3%}",
                "rows without any": f"{audit.empty_rows_share:.3%}",
                "own documents": audit.leaks,
                "repeated": audit.repeated,
                "same text as the query": f"{close.same_text_share:.2%}",
                "mean shared tokens": f"{close.mean_overlap:.1%}",
            }
        ),
        table(
            ("neighbours", "recall", "95 % from", "to"),
            [(int(depth), one.recall, one.low, one.high) for depth, one in quality.recall.items()],
            caption=f"Recall against exact search, {quality.sampled:,} query chunks ({quality.recall_of})",
        ),
        side_by_side(
            [
                *_effort_plots(quality.sweep, floor),
                _histogram(close.distance, "Squared distance to the two nearest", "squared distance"),
                _histogram(close.overlap, "Tokens of the query chunk that a neighbour shares", "share of tokens"),
                _histogram(
                    close.successor_run, "Longest run shared with what follows the query chunk", "share of a chunk"
                ),
            ]
        ),
        paragraph(
            f"The audit read {audit.rows:,} rows. Of {audit.planted_leaks:,} leaks planted in copies of them it "
            f"found {audit.planted_leaks_seen:,}; in the rows themselves it found {audit.leaks:,}.",
        ),
    )


def _verdict(quality: TableQuality, floor: float | None) -> str:
    if quality.problems:
        return paragraph("; ".join(quality.problems), "bad")
    return paragraph("Sound." if floor is None else f"Sound: recall@2 is at least the floor of {floor:g}.", "good")


def _effort_plots(sweep: Sequence[Effort], floor: float | None) -> list[str]:
    if not sweep:
        return []
    recalls = [point.recall for point in sweep]

    def plot(title: str, x_label: str, across: Sequence[float]) -> str:
        line = Series("recall@2", across, recalls)
        return line_plot([line], title=title, x_label=x_label, y_label="recall@2", log_x=True, floor=floor)

    return [
        plot("Recall by effort", "lists searched (efSearch without lists)", [point.effort for point in sweep]),
        plot("Recall by time", "CPU milliseconds per query", [point.milliseconds for point in sweep]),
    ]


def _histogram(counted: Histogram, title: str, x_label: str) -> str:
    return histogram(counted.counts, counted.edges, title=title, x_label=x_label)
