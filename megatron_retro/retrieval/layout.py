"""Where things lie in a project directory, and how it is cut into blocks.

database/            chunk database
index/plan.json      what was decided, once
index/trained/       the trained, empty index
index/codes/         one file of codes per block of chunks
index/embeddings/    kept vectors, one file per block (--retro-keep-embeddings)
index/merged/        the searchable index
neighbors/NAME/      one neighbour table per query corpus
report/              quality.json and quality.html
work/                claims of workers, unfinished tables
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_retro.artifacts.claims import BlockClaims
from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.workers import Worker


@dataclass(frozen=True)
class ProjectLayout:
    """The paths of one project directory."""

    root: Path

    @property
    def database(self) -> Path:
        """The chunk database."""
        return self.root / "database"

    @property
    def plan(self) -> Path:
        """What was decided."""
        return self.root / "index" / "plan.json"

    @property
    def live_settings(self) -> Path:
        """How the index is asked while text is generated."""
        return self.root / "index" / "live.json"

    @property
    def trained(self) -> Path:
        """The trained, empty index."""
        return self.root / "index" / "trained"

    @property
    def codes(self) -> Path:
        """Codes of blocks of chunks."""
        return self.root / "index" / "codes"

    @property
    def embeddings(self) -> Path:
        """Kept vectors of blocks of chunks."""
        return self.root / "index" / "embeddings"

    @property
    def merged(self) -> Path:
        """The searchable index."""
        return self.root / "index" / "merged"

    @property
    def report(self) -> Path:
        """Quality as JSON and as a page."""
        return self.root / "report"

    def neighbors(self, name: str) -> Path:
        """The neighbour table of a query corpus."""
        return self.root / "neighbors" / name

    def work(self, name: str) -> Path:
        """Unfinished parts of something."""
        return self.root / "work" / name

    def claims(self, name: str) -> Path:
        """Claims on the blocks of something."""
        return self.root / "work" / "claims" / name


@dataclass(frozen=True)
class Span:
    """Items [first, last), one block of work."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """As in file names."""
        return f"{self.first:013d}-{self.last:013d}"

    @property
    def size(self) -> int:
        """How many."""
        return self.last - self.first


def spans(total: int, size: int) -> tuple[Span, ...]:
    """`total` items cut into blocks of `size`, the last one perhaps smaller."""
    return tuple(Span(first, min(first + size, total)) for first in range(0, total, size))


@contextmanager
def unless_done(is_done: Callable[[], bool]) -> Iterator[None]:
    """Write and publish under this: a worker that was taken for dead may find that another has published its block.

    Both made the same bytes, so that its own attempt failed does not matter then.
    """
    try:
        yield
    except (OSError, ArtifactError):
        if not is_done():
            raise


def claimed(
    layout: ProjectLayout, what: str, blocks: Sequence[str], is_done: Callable[[str], bool], worker: Worker
) -> Iterator[str]:
    """The blocks that this worker gets to do; ends when all are done, by whomever.

    Workers start at different places, so that they rarely want the same block.
    """
    start = worker.share(len(blocks)).start
    order = [*blocks[start:], *blocks[:start]]
    return iter(BlockClaims(layout.claims(what), order, is_done))
