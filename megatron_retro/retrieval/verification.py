"""The verify stage: check every file, measure every table, write the report, fail below the recall floor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_retro.artifacts.files import write_file
from megatron_retro.artifacts.manifest import damage, load_manifest, read_manifest
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.errors import ArtifactError, BelowFloor
from megatron_retro.reporting.quality_page import (
    IndexFigures,
    QualityReport,
    TableQuality,
    quality_page,
    read_quality,
)
from megatron_retro.retrieval.faiss_index import inverted_parts
from megatron_retro.retrieval.index_building import KIND, VERSION
from megatron_retro.retrieval.neighbor_search import (
    NeighborSearch,
    check_table,
    open_searches,
    table_inputs,
    table_layout,
    table_settings,
)
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.quality import (
    audit,
    closeness,
    compare_embedders,
    effort_sweep,
    list_balance,
    recalls,
    sampled_rows,
)
from megatron_retro.retrieval.work_blocks import claim_blocks
from megatron_retro.runtime.console import say
from megatron_retro.runtime.strict_json import json_text, to_plain

_REPORT_VERSION = 1


def verify(project: Project) -> None:
    """Measure, report, and fail if a table is not sound. One worker does it; the others wait for its report.

    A report on the same files, measured the same way, is judged again; the files themselves are checked every time.
    """
    path, subject = project.layout.report / "quality.json", _report_key(project)
    if project.worker.index == 0:
        for artifact in _artifacts(project):
            _require_intact(artifact)
    for _ in claim_blocks(project.layout, "verify", ["verify"], lambda _: _is_about(path, subject), project.worker):
        report = replace(_measured(project), subject=subject)
        write_file(path.with_name("quality.html"), quality_page(report))
        write_file(path, json_text(to_plain(report), indent=1) + "\n")
    judge(read_quality(path), path)


def _report_key(project: Project) -> str:
    """Identifies the tables and settings of a report, so that an old report is never judged in its place."""
    config = project.config
    measured = [config.retro_verify_queries, config.retro_verify_rows, config.retro_verify_embedders]
    fingerprints = [load_manifest(path).fingerprint for path in _artifacts(project)]
    facts = [_REPORT_VERSION, fingerprints, measured, config.retro_recall_floor]
    return hashlib.sha256(json_text(facts).encode()).hexdigest()


def _artifacts(project: Project) -> list[Path]:
    """The directories that are verified."""
    return [project.layout.merged, *(project.layout.neighbors(corpus.name) for corpus in project.query_corpora)]


def _is_about(path: Path, subject: str) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("subject") == subject)
    except (FileNotFoundError, ValueError):
        return False


def judge(report: QualityReport, path: Path) -> None:
    """Print the measurements; raise if something is below its floor."""
    for name, quality in report.tables.items():
        shown = "  ".join(f"@{depth} {one.recall:.4f}" for depth, one in quality.recall.items())
        say(f"verify: {name}: recall {shown}; leaks {quality.audit.leaks} in {quality.audit.rows:,} rows")
    say(f"verify: report at {path.with_name('quality.html')}")
    problems = [f"{name}: {problem}" for name, one in report.tables.items() for problem in one.problems]
    if problems:
        raise BelowFloor(
            "the neighbours are not good enough",
            got="; ".join(problems),
            fix=f"see {path.with_name('quality.html')}; raise --retro-query-nprobe or choose a finer index",
        )


def _measured(project: Project) -> QualityReport:
    tables: dict[str, TableQuality] = {}
    searches = open_searches(project, project.query_corpora)
    for search in searches:
        path = project.layout.neighbors(search.corpus.name)
        layout = table_layout(project, search.corpus, search.chunks)
        settings = table_settings(project, search.searcher.nprobe, search.searcher.ef_search)
        table = check_table(path, table_inputs(project, search.chunks.file), settings, layout)
        tables[search.corpus.name] = _table_quality(search, table)
    return QualityReport(
        recall_floor=project.config.retro_recall_floor,
        embedder=project.embedder.fingerprint,
        index=_index_figures(project, searches[0]),
        tables=tables,
        embedders=compare_embedders(searches[0], project.config.retro_verify_embedders or ()),
    )


def _table_quality(search: NeighborSearch, table: NeighborTable) -> TableQuality:
    config = search.project.config
    rows = sampled_rows(search, table, config.retro_verify_queries)
    bm25 = config.retro_candidates == "bm25"
    chosen = bm25 or config.retro_rerank != "none" or config.retro_drop_overlap is not None
    ids = rows.ids_QK
    if chosen:
        saved = config.retro_query_num_neighbors_save
        ids = search.searcher.search(rows.exact.vectors, saved, search.own_chunks(rows.numbers), saved).ids_QK
    quality = TableQuality(
        rows=table.layout.num_rows,
        saved=table.num_saved,
        sampled=len(rows.numbers),
        recall_of=_recall_of(bm25, chosen),
        recall=recalls(rows, ids, search),
        audit=audit(search, table, config.retro_verify_rows),
        closeness=closeness(search, rows),
        sweep=effort_sweep(search, rows, _efforts(search)),
    )
    return replace(quality, problems=_problems(quality, config.retro_recall_floor))


def _recall_of(bm25: bool, chosen: bool) -> str:
    if bm25:
        return "the index, by which no row of the table was found"
    return "the search before re-ranking and dropping" if chosen else "the rows of the table"


def _problems(quality: TableQuality, floor: float | None) -> list[str]:
    audited, problems = quality.audit, []
    if audited.leaks:
        problems.append(f"{audited.leaks} neighbours are from the query's own documents")
    if audited.planted_leaks_seen != audited.planted_leaks:
        found = f"{audited.planted_leaks_seen} of {audited.planted_leaks}"
        problems.append(f"the audit saw {found} planted leaks: do not trust it")
    if audited.repeated:
        problems.append(f"{audited.repeated} neighbours are repeated in their row")
    at = "2" if "2" in quality.recall else "1"
    measured = quality.recall[at].recall
    if floor is not None and measured < floor:
        problems.append(f"recall@{at} is {measured:.4f}, below the floor of {floor:g}")
    return problems


def _efforts(search: NeighborSearch) -> list[int]:
    """Numbers of lists around the one in use."""
    parts = inverted_parts(search.searcher.index)
    if parts is None:
        return [16, 32, 64, 128, 256]
    if parts.num_lists == 1:
        return []
    around = search.searcher.nprobe
    wanted = {1, 2, 4, around // 4, around // 2, around, 2 * around, 4 * around, 8 * around}
    gpus = search.searcher.gpus
    most = gpus.most_lists if gpus is not None else parts.num_lists
    return sorted(value for value in wanted if 1 <= value <= most)


def _index_figures(project: Project, search: NeighborSearch) -> IndexFigures:
    parts = inverted_parts(search.searcher.index)
    sizes = (
        np.array([parts.inverted.invlists.list_size(number) for number in range(parts.num_lists)], np.int64)
        if parts
        else None
    )
    manifest = read_manifest(project.layout.merged, kind=KIND, version=VERSION)
    return IndexFigures(
        chunks=manifest.counts["chunks"],
        index_str=manifest.config["index_str"],
        nprobe=search.searcher.nprobe,
        ef_search=search.searcher.ef_search,
        by_lists=search.searcher.by_lists,
        on_gpus=search.searcher.gpus is not None,
        balance=list_balance(sizes) if sizes is not None and len(sizes) > 1 else None,
    )


def _require_intact(path: Path) -> None:
    problems = damage(path, load_manifest(path))
    if problems:
        raise ArtifactError(f"{path} is damaged", got="; ".join(problems), fix=f"remove {path} and run the stage again")
