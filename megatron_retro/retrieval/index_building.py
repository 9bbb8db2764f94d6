"""The encode and merge stages: codes of blocks of chunks, then one index on disk, list after list.

The index is never in memory as a whole. The place of every list in `lists.ivfdata` follows from the sizes in the
blocks, so ranges of lists are written into the file by any number of workers. faiss's own merge opens one whole index
per block, quantizer included, which at four million lists and 190,000 blocks no machine could; the file that results is
the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.block_checksums import CheckedContent, ChecksumList, checksums_of
from megatron_retro.artifacts.files import (
    flush_directory,
    has_size,
    make_folder,
    named_disk_errors,
    publish_directory,
    remove_leftovers,
    write_file,
)
from megatron_retro.artifacts.manifest import file_records, read_manifest, require_same, write_manifest
from megatron_retro.artifacts.mapped_files import map_file
from megatron_retro.artifacts.verified import open_artifact, unread, whole_file_check
from megatron_retro.errors import ArtifactError
from megatron_retro.retrieval.chunk_encoding import ChunkEncoder, facts_of, map_arrays, verify_arrays
from megatron_retro.retrieval.faiss_index import InvertedParts, faiss_module, inverted_parts, read_index, write_index
from megatron_retro.retrieval.index_training import open_trained, trained_fingerprint
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.work_blocks import claim_blocks, ignore_failure_if_done, key_of, recompute
from megatron_retro.runtime.console import Progress

KIND = "retrieval-index"
VERSION = 1
INDEX_FILE = "index.faiss"
LISTS_FILE = "lists.ivfdata"
LISTS_CHECKSUMS = "lists.blocks"
SEGMENT_BYTES = 1 << 28
_ID_BYTES = 8
_SAME_DIRECTORY = "IO_FLAG_ONDISK_SAME_DIR"


@dataclass(frozen=True)
class ListMerge:
    """The merge of an inverted index. `blocks` are the encoded files in the order of their chunks."""

    directory: Path
    marks: Path
    blocks: tuple[Path, ...]
    block_facts: dict[str, Any]
    num_lists: int
    code_size: int
    segment_bytes: int

    @property
    def entry_bytes(self) -> int:
        """Bytes of a chunk in the lists."""
        return self.code_size + _ID_BYTES

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Chunks of each list."""
        sizes = np.zeros(self.num_lists, np.int64)
        for block in self.blocks:
            arrays = map_arrays(block, self.block_facts)
            sizes[arrays["lists"]] += np.diff(arrays["starts"])
        return sizes

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each list starts in the file, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.sizes * self.entry_bytes)]).astype(np.int64)

    @cached_property
    def segments(self) -> dict[str, tuple[int, int]]:
        """Ranges of lists that one worker writes at a time, by name."""
        bounds = [0]
        while bounds[-1] < self.num_lists:
            limit = self.offsets[bounds[-1]] + self.segment_bytes
            after = int(np.searchsorted(self.offsets, limit, side="right")) - 1
            bounds.append(min(max(after, bounds[-1] + 1), self.num_lists))
        return {f"lists-{first:08d}-{last:08d}": (first, last) for first, last in pairwise(bounds)}

    def is_done(self, segment: str) -> bool:
        """Whether a segment is in the file."""
        return (self.marks / segment).exists()

    def is_prepared(self) -> bool:
        """Whether the file has its full size; it may be published by another worker at this moment."""
        return has_size(self.directory / LISTS_FILE, int(self.offsets[-1]))

    def prepare(self) -> None:
        """Make the file in its full size."""
        make_folder(self.directory)
        path = self.directory / LISTS_FILE
        with named_disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.ftruncate(descriptor, int(self.offsets[-1]))
            finally:
                os.close(descriptor)

    def write_segment(self, segment: str) -> None:
        """Write one range of lists into its place."""
        first, last = self.segments[segment]
        path = self.directory / LISTS_FILE
        content = self._segment(first, last)
        with named_disk_errors(path), path.open("rb+") as stream:
            stream.seek(int(self.offsets[first]))
            stream.write(content.data)
            stream.flush()
            os.fsync(stream.fileno())
        write_file(self.marks / segment, "")

    def _segment(self, first: int, last: int) -> NDArray[np.uint8]:
        """The bytes of the lists [first, last): for each list the codes, then the ids."""
        start = int(self.offsets[first])
        content = np.empty(int(self.offsets[last]) - start, np.uint8)
        filled = np.zeros(last - first, np.int64)
        for block in self.blocks:
            arrays = map_arrays(block, self.block_facts)
            begin, end = np.searchsorted(arrays["lists"], [first, last])
            for place in range(int(begin), int(end)):
                number = int(arrays["lists"][place])
                rows = slice(int(arrays["starts"][place]), int(arrays["starts"][place + 1]))
                already, size = int(filled[number - first]), int(self.sizes[number])
                filled[number - first] += rows.stop - rows.start
                base = int(self.offsets[number]) - start
                codes = arrays["codes"][rows].reshape(-1)
                at = base + already * self.code_size
                content[at : at + codes.size] = codes
                ids = arrays["ids"][rows].view(np.uint8)
                at = base + size * self.code_size + already * _ID_BYTES
                content[at : at + ids.size] = ids
        return content

    def finish(self, trained: InvertedParts, path: Path, inputs: dict[str, str], config: dict[str, Any]) -> None:
        """Write the index that points into the file, and give the directory its name."""
        if not self.is_prepared():
            raise ArtifactError(f"{self.directory / LISTS_FILE} is gone or cut", fix="merge again")
        missing = [segment for segment in self.segments if not self.is_done(segment)]
        if missing:
            raise ArtifactError(f"{self.directory} lacks {len(missing)} segments", got=missing[0], fix="merge again")
        faiss, sizes = faiss_module(), self.sizes.astype(np.uint64)
        lists = faiss.OnDiskInvertedLists()
        lists.nlist, lists.code_size, lists.read_only = self.num_lists, self.code_size, True
        lists.filename, lists.totsize = LISTS_FILE, int(self.offsets[-1])
        lists.lists.resize(self.num_lists)
        lists.set_all_lists_sizes(faiss.swig_ptr(sizes))
        trained.inverted.replace_invlists(lists, False)
        trained.inverted.ntotal = trained.index.ntotal = int(self.sizes.sum())
        write_index(trained.index, self.directory / INDEX_FILE)
        counts = {"chunks": int(self.sizes.sum()), "lists": self.num_lists, "largest_list": int(self.sizes.max())}
        write_file(self.directory / LISTS_CHECKSUMS, checksums_of(self.directory / LISTS_FILE).to_bytes())
        _publish(self.directory, path, (INDEX_FILE, LISTS_FILE, LISTS_CHECKSUMS), inputs, config, counts)


def merge_whole(
    trained: Any,
    blocks: tuple[Path, ...],
    block_facts: dict[str, Any],
    directory: Path,
    path: Path,
    inputs: dict[str, str],
    config: dict[str, Any],
) -> None:
    """Fill an index that is no inverted file, in the order of the chunks, in memory."""
    for block in blocks:
        trained.add(np.ascontiguousarray(verify_arrays(block, block_facts)["vectors"]))
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_index(trained, directory / INDEX_FILE)
    _publish(directory, path, (INDEX_FILE,), inputs, config, {"chunks": int(trained.ntotal), "lists": 0})


def open_merged(path: Path) -> Any:
    """The searchable index, verified; lists of 64 MB and more stay on disk, for `list_checks` to verify."""
    fix = _merge_again(path)
    manifest = open_artifact(path, kind=KIND, version=VERSION, fix=fix)
    return read_index(path, manifest, INDEX_FILE, fix=fix, flags=getattr(faiss_module(), _SAME_DIRECTORY))


def list_checks(path: Path, worker: int = 0, workers: int = 1) -> Iterator[Callable[[], object]]:
    """Checks of one worker's share of the inverted lists that are too large to be verified when they are opened."""
    manifest = read_manifest(path, kind=KIND, version=VERSION)
    for name in unread(manifest):
        if name == LISTS_FILE and LISTS_CHECKSUMS in manifest.files:
            sums = ChecksumList.parse(map_file(path / LISTS_CHECKSUMS), path / LISTS_CHECKSUMS)
            checked = CheckedContent(path / name, map_file(path / name), sums.checksums, sums.block_bytes)
            yield from (partial(checked.require_block, number) for number in range(worker, checked.num_blocks, workers))
        elif worker == 0 and name != INDEX_FILE:
            yield whole_file_check(path, manifest, name, _merge_again(path))


def _merge_again(path: Path) -> str:
    return f"remove {path} and run the merge stage again"


def _publish(
    directory: Path,
    path: Path,
    names: tuple[str, ...],
    inputs: dict[str, str],
    config: dict[str, Any],
    counts: dict[str, int],
) -> None:
    for file in directory.iterdir():
        if file.name not in names:
            file.unlink(missing_ok=True)  # a late worker's may go by itself
    files = file_records(directory, names)
    write_manifest(directory, kind=KIND, version=VERSION, inputs=inputs, config=config, counts=counts, files=files)
    flush_directory(directory)
    publish_directory(directory, path)


def encode(project: Project) -> None:
    """Encode the blocks that no worker has encoded yet."""
    layout, trained = project.layout, open_trained(project)
    encoder = ChunkEncoder(project.chunk_vectors, trained, block_facts(project))
    named = {block.name: block for block in project.blocks}
    kept = project.kept_vectors
    remove_leftovers(layout.codes)
    with Progress("encode", sum(block.size for block in named.values()), "chunks") as progress:

        def is_done(name: str) -> bool:
            return project.codes_path(named[name]).exists()

        progress.advance(sum(block.size for name, block in named.items() if is_done(name)))
        for name in claim_blocks(layout, "encode", list(named), is_done, project.worker):
            encoder.write_block(named[name], project.codes_path(named[name]), kept, progress.advance)
    files = [project.codes_path(block) for block in project.blocks]
    share = project.config.retro_task_validate
    recompute("encode", files, share, lambda number, path: encoder.write_block(project.blocks[number], path, kept))


def merge(project: Project) -> None:
    """Merge all codes into the searchable index, shared by ranges of lists; what the workers had beside it goes."""
    if project.layout.merged.exists():
        check_merged(project)
    else:
        _merge(project)
    key = key_of(block_facts(project))
    for leftover in (f"checked-{key}", f"merged-ranges-{key}", f"merged-{key}"):
        shutil.rmtree(project.layout.work(leftover), ignore_errors=True)


def _merge(project: Project) -> None:
    layout, facts = project.layout, block_facts(project)
    paths, key = tuple(project.codes_path(block) for block in project.blocks), key_of(facts)
    _check_blocks(project, paths, facts)
    directory = layout.work(f"merged-{key}")

    def done(_: str) -> bool:
        return layout.merged.exists()

    inputs, config = _merged_inputs(project), {"index_str": project.index_spec["index_str"]}
    parts = inverted_parts(open_trained(project))
    if parts is None:
        for _ in claim_blocks(layout, "merge", ["whole"], done, project.worker):
            with ignore_failure_if_done(layout.merged.exists):
                merge_whole(open_trained(project), paths, facts, directory, layout.merged, inputs, config)
        return
    segment_bytes = int(min(SEGMENT_BYTES, project.memory_bytes / 4))
    task = ListMerge(
        directory, layout.work(f"merged-ranges-{key}"), paths, facts, parts.num_lists, parts.code_size, segment_bytes
    )
    for _ in claim_blocks(
        layout, "merge", ["prepare"], lambda _: layout.merged.exists() or task.is_prepared(), project.worker
    ):
        with ignore_failure_if_done(layout.merged.exists):
            task.prepare()
    with Progress("merge", len(task.segments), "ranges of lists") as progress:

        def settled(name: str) -> bool:
            return layout.merged.exists() or task.is_done(name)

        for name in claim_blocks(layout, "merge", list(task.segments), settled, project.worker):
            with ignore_failure_if_done(layout.merged.exists):
                task.write_segment(name)
            progress.advance(1)
    for _ in claim_blocks(layout, "merge", ["finish"], done, project.worker):
        with ignore_failure_if_done(layout.merged.exists):
            task.finish(parts, layout.merged, inputs, config)


def check_merged(project: Project) -> None:
    """Refuse a merged index that was built from other inputs."""
    where = project.layout.merged
    manifest = read_manifest(where, kind=KIND, version=VERSION)
    for name, value in _merged_inputs(project).items():
        require_same(where, name, manifest.inputs.get(name), value, f"remove {where} and merge again")


def block_facts(project: Project) -> dict[str, Any]:
    """Fingerprints of the trained index and the database, which every block of codes must carry."""
    return {"trained": trained_fingerprint(project), "database": project.index_spec["database"]}


def _merged_inputs(project: Project) -> dict[str, str]:
    return {
        "database": project.database.fingerprint,
        "embedder": project.embedder.fingerprint,
        "trained": trained_fingerprint(project),
    }


def _check_blocks(project: Project, paths: tuple[Path, ...], facts: dict[str, Any]) -> None:
    """Verify every byte of every block, each once, shared among workers."""
    marks = project.layout.work(f"checked-{key_of(facts)}")
    by_name = {path.name: path for path in paths}

    def is_done(name: str) -> bool:
        return (marks / name).exists() or project.layout.merged.exists()

    for name in claim_blocks(project.layout, "check", list(by_name), is_done, project.worker):
        verify_arrays(by_name[name], facts)
        if project.kept_vectors is not None:
            project.kept_vectors.verify(facts_of(by_name[name]))
        with ignore_failure_if_done(project.layout.merged.exists):
            write_file(marks / name, "")
