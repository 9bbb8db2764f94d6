"""The files of a project directory.

database/            chunk database
index/plan.json      what was index_spec, once
index/trained/       the trained, empty index
index/codes/         one file of codes per block of chunks
index/embeddings/    kept vectors, one file per block (--retro-keep-embeddings)
index/merged/        the searchable index
neighbors/NAME/      one neighbour table per query corpus
report/              quality.json and quality.html
duplicates/          documents that come back, by find-duplicates
work/                claims of workers, unfinished tables
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProjectLayout:
    """The paths of one project directory."""

    root: Path

    @property
    def database(self) -> Path:
        """The chunk database."""
        return self.root / "database"

    @property
    def index_spec(self) -> Path:
        """What was index_spec."""
        return self.root / "index" / "plan.json"

    @property
    def live_settings(self) -> Path:
        """The settings for live search while text is generated."""
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

    @property
    def duplicates(self) -> Path:
        """Documents of the database that come back, in it or in held-out sets."""
        return self.root / "duplicates"

    def neighbors(self, name: str) -> Path:
        """The neighbour table of a query corpus."""
        return self.root / "neighbors" / name

    def work(self, name: str) -> Path:
        """Unfinished parts of something."""
        return self.root / "work" / name

    def claims(self, name: str) -> Path:
        """Claims on the blocks of something."""
        return self.root / "work" / "claims" / name
