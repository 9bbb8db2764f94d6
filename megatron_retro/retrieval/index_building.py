"""The encode and merge stages of a project: who does which block, and what each one must have been made from."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import remove_leftovers, write_file
from megatron_retro.artifacts.manifest import read_manifest, require_same
from megatron_retro.retrieval.block_files import facts_of, verify_arrays
from megatron_retro.retrieval.encoding import ChunkEncoder
from megatron_retro.retrieval.faiss_index import inverted_parts
from megatron_retro.retrieval.layout import claimed, unless_done
from megatron_retro.retrieval.merging import KIND, VERSION, ListMerge, merge_whole
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.recomputing import recompute
from megatron_retro.retrieval.training import open_trained, trained_fingerprint
from megatron_retro.runtime.console import Progress
from megatron_retro.runtime.strict_json import json_text

SEGMENT_BYTES = 1 << 28


def encode(project: Project) -> None:
    """Encode the blocks that nobody has encoded yet."""
    layout, trained = project.layout, open_trained(project)
    encoder = ChunkEncoder(project.database, project.embedder, trained, block_facts(project))
    named = {span.name: span for span in project.blocks}
    kept = project.kept_vectors
    remove_leftovers(layout.codes)
    with Progress("encode", sum(span.size for span in named.values()), "chunks") as progress:

        def is_done(name: str) -> bool:
            return project.codes_path(named[name]).exists()

        progress.advance(sum(span.size for name, span in named.items() if is_done(name)))
        for name in claimed(layout, "encode", list(named), is_done, project.worker):
            encoder.write_block(named[name], project.codes_path(named[name]), kept)
            progress.advance(named[name].size)
    files = [project.codes_path(span) for span in project.blocks]
    share = project.config.retro_task_validate
    recompute("encode", files, share, lambda number, path: encoder.write_block(project.blocks[number], path, kept))


def merge(project: Project) -> None:
    """Merge all codes into the searchable index; the work is shared by ranges of lists."""
    layout = project.layout
    if layout.merged.exists():
        check_merged(project)
        return
    paths, facts = tuple(project.codes_path(span) for span in project.blocks), block_facts(project)
    key = _key(facts)
    _check_blocks(project, paths, facts)
    directory = layout.work(f"merged-{key}")

    def done(_: str) -> bool:
        return layout.merged.exists()

    inputs, config = _merged_inputs(project), {"index_str": project.decided["index_str"]}
    parts = inverted_parts(open_trained(project))
    if parts is None:
        for _ in claimed(layout, "merge", ["whole"], done, project.worker):
            with unless_done(layout.merged.exists):
                merge_whole(open_trained(project), paths, facts, directory, layout.merged, inputs, config)
        return
    segment_bytes = int(min(SEGMENT_BYTES, project.memory_bytes / 4))
    task = ListMerge(
        directory, layout.work(f"merged-ranges-{key}"), paths, facts, parts.num_lists, parts.code_size, segment_bytes
    )
    for _ in claimed(
        layout, "merge", ["prepare"], lambda _: layout.merged.exists() or task.is_prepared(), project.worker
    ):
        with unless_done(layout.merged.exists):
            task.prepare()
    with Progress("merge", len(task.segments), "ranges of lists") as progress:

        def settled(name: str) -> bool:
            return layout.merged.exists() or task.is_done(name)

        for name in claimed(layout, "merge", list(task.segments), settled, project.worker):
            with unless_done(layout.merged.exists):
                task.write_segment(name)
            progress.advance(1)
    for _ in claimed(layout, "merge", ["finish"], done, project.worker):
        with unless_done(layout.merged.exists):
            task.finish(parts, layout.merged, inputs, config)
    for leftover in (f"checked-{key}", f"merged-ranges-{key}"):
        shutil.rmtree(layout.work(leftover), ignore_errors=True)


def check_merged(project: Project) -> None:
    """Refuse an index that was made from something else."""
    where = project.layout.merged
    manifest = read_manifest(where, kind=KIND, version=VERSION)
    for name, value in _merged_inputs(project).items():
        require_same(where, name, manifest.inputs.get(name), value, f"remove {where} and merge again")


def block_facts(project: Project) -> dict[str, Any]:
    """What every block of codes must have been made from."""
    return {"trained": trained_fingerprint(project), "database": project.decided["database"]}


def _merged_inputs(project: Project) -> dict[str, str]:
    return {
        **{name: project.decided[name] for name in ("database", "embedder")},
        "trained": trained_fingerprint(project),
    }


def _check_blocks(project: Project, paths: tuple[Path, ...], facts: dict[str, Any]) -> None:
    """Every byte of every block, once, by whichever worker."""
    marks = project.layout.work(f"checked-{_key(facts)}")
    by_name = {path.name: path for path in paths}

    def is_done(name: str) -> bool:
        return (marks / name).exists() or project.layout.merged.exists()

    for name in claimed(project.layout, "check", list(by_name), is_done, project.worker):
        verify_arrays(by_name[name], facts)
        if project.kept_vectors is not None:
            project.kept_vectors.verify(facts_of(by_name[name]))
        write_file(marks / name, "")


def _key(facts: dict[str, Any]) -> str:
    """Unfinished work on other codes must never be taken for this one's."""
    return hashlib.sha256(json_text(facts, sort_keys=True).encode()).hexdigest()[:12]
