"""What `inspect-neighbors` shows: chunks, their neighbours, and the runs of tokens that they share.

The page is plain HTML and can be read without a script; the script only searches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_retro.artifacts.files import write_file
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.retrieval import InspectorConfig, RetrievalConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.query_chunks import QueryChunks
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import Tokenizer, build_tokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.reporting.html import page
from megatron_retro.reporting.marked_text import MARKED_STYLE, marked_text, shared_runs
from megatron_retro.retrieval.layout import ProjectLayout
from megatron_retro.retrieval.live_index import LiveIndex, live_settings
from megatron_retro.retrieval.quality import covered_rows
from megatron_retro.retrieval.training import uniform_sample

_STYLE = """
#find { position: sticky; top: 0; background: var(--paper); padding: .6rem 0; border-bottom: 1px solid var(--rule); }
#find input { font: inherit; padding: .35rem .6rem; width: min(30rem, 70vw); border: 1px solid var(--soft);
  border-radius: .3rem; background: var(--paper); color: var(--ink); }
article { border: 1px solid var(--rule); border-radius: .4rem; padding: .4rem 1rem 1rem; margin: 1rem 0; }
article h2 { border: 0; margin: .4rem 0; padding: 0; font-size: 1.05rem; }
article li { margin: .7rem 0; } [hidden] { display: none; }
"""
_SCRIPT = """
const input = document.querySelector('#find input'), count = document.querySelector('#count');
const articles = [...document.querySelectorAll('article')];
const texts = articles.map(one => one.textContent.toLowerCase());
function search() {
  const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  articles.forEach((one, number) => {
    one.hidden = !words.every(word => texts[number].includes(word));
    shown += one.hidden ? 0 : 1;
  });
  count.textContent = shown + ' of ' + articles.length + ' chunks';
}
input.addEventListener('input', search);
search();
"""


@dataclass(frozen=True)
class Shown:
    """What is needed to show rows of one table."""

    index: LiveIndex
    tokenizer: Tokenizer
    table: NeighborTable
    chunks: QueryChunks
    config: InspectorConfig


def inspect_neighbors(settings: Settings) -> None:
    """Write a page per table of the project, and print their paths."""
    retrieval, config = settings[RetrievalConfig], settings[InspectorConfig]
    layout = ProjectLayout(Path(retrieval.retro_project_dir))
    tokenizer = build_tokenizer(TokenizerConfig(**live_settings(layout)["tokenizer"]))
    index = LiveIndex(layout.root)
    tables = _tables(layout, index, retrieval.retro_query_corpus)
    if config.inspect_output is not None and len(tables) > 1:
        raise ConfigError(
            "--inspect-output names one page, but the project has several tables",
            got=", ".join(tables),
            fix="name one: --retro-query-corpus NAME=PREFIX",
        )
    for name, (table, file) in tables.items():
        chunks = QueryChunks(file, index.database.chunk_length)
        path = Path(config.inspect_output) if config.inspect_output else layout.report / f"neighbors-{name}.html"
        write_file(path, inspector_page(Shown(index, tokenizer, table, chunks, config), name))
        print(path)


def inspector_page(shown: Shown, name: str) -> str:
    """The page of one table."""
    rows = shown.table.layout.num_rows
    numbers = covered_rows(shown.table, uniform_sample(rows, min(rows, shown.config.inspect_rows)))
    find = (
        '<div id="find" role="search"><label>Find <input type="search" placeholder="words, chunk or document numbers">'
        '</label> <span id="count" class="soft" aria-live="polite"></span></div>'
    )
    return page(
        f"Neighbours of {name}",
        [find, *(_article(shown, int(number)) for number in numbers)],
        summary=f"{len(numbers):,} of {rows:,} query chunks. Marked: runs of at least {shown.config.inspect_run} "
        "tokens that a neighbour shares with the chunk or with what follows it. Grey: what follows.",
        style=_STYLE + MARKED_STYLE,
        script=_SCRIPT,
    )


def _article(shown: Shown, number: int) -> str:
    length, file = shown.chunks.chunk_length, shown.chunks.file
    text = file.tokens(number * length, min((number + 2) * length, file.num_tokens)).tolist()
    first, last = (int(bound[0]) for bound in shown.chunks.documents(np.array([number])))
    documents = f"document {first}" if last == first + 1 else f"documents {first} to {last - 1}"
    neighbors = _neighbors(shown, number, text)
    listed = f"<ol>{''.join(neighbors)}</ol>" if neighbors else '<p class="soft">It has no neighbours.</p>'
    body = marked_text(shown.tokenizer.decode, text, [], length)
    return f"<article><h2>Chunk {number}, {documents}</h2>{body}{listed}</article>"


def _neighbors(shown: Shown, number: int, text: Sequence[int]) -> list[str]:
    database, length = shown.index.database, shown.chunks.chunk_length
    ids = shown.table.rows(number, number + 1)[0, : shown.config.inspect_neighbors]
    ids = ids[ids >= 0]
    if not len(ids):
        return []
    tokens, there = database.gather(ids, 2 * length)
    distances = _distances(shown, text[:length], ids)
    items = []
    for one, row, mask, distance in zip(ids, tokens, there, distances, strict=True):
        content = row[mask].tolist()
        runs = shared_runs(text, content, shown.config.inspect_run)
        title = (
            f"chunk {one}, document {int(database.document_of(np.array([one]))[0])}, squared distance {distance:.3f}"
        )
        items.append(
            f'<li><div class="soft">{title}</div>{marked_text(shown.tokenizer.decode, content, runs, length)}</li>'
        )
    return items


def _distances(shown: Shown, text: Sequence[int], ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[float]:
    embedder, database = shown.index.embedder, shown.index.database
    tokens = np.array([text])
    query = embedder.embed(tokens, tokens != (-1 if database.eod is None else database.eod))
    chunks = embedder.embed(*database.gather(ids, database.chunk_length))
    return [float(value) for value in np.square(chunks - query).sum(axis=1)]


def _tables(
    layout: ProjectLayout, index: LiveIndex, given: Sequence[str] | None
) -> dict[str, tuple[NeighborTable, TokenFile]]:
    """The tables to show, each with the corpus that it belongs to."""
    named = dict(text.partition("=")[::2] if "=" in text else (Path(text).name, text) for text in given or ())
    known = {file.fingerprint: file for file in index.database.files}
    names = list(named) or sorted(path.name for path in layout.root.glob("neighbors/*") if path.is_dir())
    tables: dict[str, tuple[NeighborTable, TokenFile]] = {}
    for name in names:
        table = NeighborTable.open(layout.neighbors(name))
        file = TokenFile(named[name]) if name in named else known.get(table.corpus_fingerprint)
        if file is None:
            continue
        if file.fingerprint != table.corpus_fingerprint:
            raise ArtifactError(
                f"{table.path} belongs to another corpus", got=file.prefix, fix="give the token file that was queried"
            )
        tables[name] = (table, file)
    if not tables:
        raise ArtifactError(
            f"{layout.root} has no table whose corpus is known",
            fix="query first, or name the corpus: --retro-query-corpus NAME=PREFIX",
        )
    return tables
