"""The quality report as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_retro.reporting.html import facts, page, paragraph, section, table
from megatron_retro.reporting.plots import Series, histogram, line_plot


def quality_page(report: Mapping[str, Any]) -> str:
    """The page of a report made by `verification.py`."""
    parts = [_index_part(report)]
    for name, quality in report["tables"].items():
        parts.append(_table_part(name, quality, report["recall_floor"]))
    if report["embedders"]:
        parts.append(_embedders_part(report["embedders"]))
    return page("Retrieval quality", parts, summary=_summary(report))


def _embedders_part(rows: Sequence[Mapping[str, Any]]) -> str:
    """Embedders side by side."""
    header = tuple(rows[0])
    return section(
        "Embedders",
        paragraph(
            "Two exact neighbours in a sample of the database per query chunk. What they share with the text that "
            "follows the chunk is what a model can gain."
        ),
        table(header, [tuple(row[name] for name in header) for row in rows]),
    )


def _summary(report: Mapping[str, Any]) -> str:
    index = report["index"]
    return f"{index['chunks']:,} chunks, {index['index_str']}, embedder: {report['embedder']}"


def _index_part(report: Mapping[str, Any]) -> str:
    index = report["index"]
    parts = [
        facts(
            {
                "chunks": index["chunks"],
                "index": index["index_str"],
                "lists searched": index["nprobe"],
                "efSearch": index["ef_search"],
                "method": _method(index),
            }
        )
    ]
    if index["balance"]:
        balance = index["balance"]
        parts.append(
            facts(
                {"imbalance of lists": balance["imbalance"], "largest": balance["largest"], "empty": balance["empty"]}
            )
        )
        sizes = balance["sizes"]
        parts.append(
            histogram(sizes["counts"], sizes["edges"], title="Sizes of inverted lists", x_label="chunks in a list")
        )
    return section("Index", *parts)


def _table_part(name: str, quality: Mapping[str, Any], floor: float | None) -> str:
    audit, close = quality["audit"], quality["closeness"]
    return section(
        f"Table {name}",
        _verdict(quality, floor),
        facts(
            {
                "rows": quality["rows"],
                "neighbours per row": quality["saved"],
                "missing": f"{audit['missing_share']:.3%}",
                "rows without any": f"{audit['empty_rows_share']:.3%}",
                "own documents": audit["leaks"],
                "repeated": audit["repeated"],
                "same text as the query": f"{close['same_text_share']:.2%}",
                "mean shared tokens": f"{close['mean_overlap']:.1%}",
            }
        ),
        table(
            ("neighbours", "recall", "95 % from", "to"),
            [(int(at), one["recall"], one["low"], one["high"]) for at, one in quality["recall"].items()],
            caption=f"Recall against exact search, {quality['sampled']:,} query chunks ({quality['recall_of']})",
        ),
        *_effort_plots(quality, floor),
        *_closeness_plots(close),
        paragraph(
            f"The audit read {audit['rows']:,} rows. Of {audit['planted_leaks']:,} leaks planted in copies of them it "
            f"found {audit['planted_leaks_seen']:,}; in the rows themselves it found {audit['leaks']:,}.",
        ),
    )


def _verdict(quality: Mapping[str, Any], floor: float | None) -> str:
    if quality["problems"]:
        return paragraph("; ".join(quality["problems"]), "bad")
    return paragraph("Sound." if floor is None else f"Sound: recall@2 is at least the floor of {floor:g}.", "good")


def _effort_plots(quality: Mapping[str, Any], floor: float | None) -> list[str]:
    points = quality["sweep"]
    if not points:
        return []
    recall = [point["recall@2"] for point in points]
    efforts, costs = [point["effort"] for point in points], [point["milliseconds"] for point in points]
    return [
        line_plot(
            [Series("recall@2", efforts, recall)],
            title="Recall by effort",
            x_label="lists searched (efSearch without lists)",
            y_label="recall@2",
            log_x=True,
            floor=floor,
        ),
        line_plot(
            [Series("recall@2", costs, recall)],
            title="Recall by time",
            x_label="CPU milliseconds per query",
            y_label="recall@2",
            log_x=True,
            floor=floor,
        ),
    ]


def _closeness_plots(close: Mapping[str, Any]) -> list[str]:
    shown = (
        ("distance", "Squared distance to the two nearest", "squared distance"),
        ("overlap", "Tokens of the query chunk that a neighbour shares", "share of tokens"),
        ("successor_run", "Longest run shared with what follows the query chunk", "share of a chunk"),
    )
    return [
        histogram(close[key]["counts"], close[key]["edges"], title=title, x_label=label) for key, title, label in shown
    ]


def _method(index: Mapping[str, Any]) -> str:
    if index["on_gpus"]:
        return "query by query, on GPUs"
    return "list by list" if index["by_lists"] else "query by query"
