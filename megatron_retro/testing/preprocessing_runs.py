"""Preprocessing in tests: records, runs in this process and in others, the bytes that come out."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_retro.cli.main import main
from megatron_retro.testing.corpora import random_text

SCRIPT = """
import sys
from megatron_retro.data.preprocessing import appending, job
job.SMALLEST_BLOCK, appending.APPENDED_BYTES = 30000, 30000
from megatron_retro.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def records(seed: int, count: int) -> list[dict[str, Any]]:
    """Records with a text each, one of them empty and one a list of sentences."""
    generator = random.Random(seed)
    found: list[dict[str, Any]] = [
        {"id": number, "text": random_text(generator, generator.randrange(60))} for number in range(count)
    ]
    found[count // 2]["text"] = ""
    found[count // 3]["text"] = ["one sentence.", "", "another"]
    return found


def preprocess(prefix: Path, inputs: Sequence[Path | str], *flags: str) -> int:
    """Run the command in this process; its exit code."""
    words = ["preprocess", "--input", *map(str, inputs), "--output-prefix", str(prefix), *flags]
    return main(words if "--workers" in flags else [*words, "--workers", "1"])


def files(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    """The bytes of the two files."""
    base = f"{prefix}_{key}_document"
    return Path(base + ".bin").read_bytes(), Path(base + ".idx").read_bytes()


def compressed(path: Path, lines: bytes) -> Path:
    """Lines in a file of two members or frames."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines[: len(lines) // 2]) + gzip.compress(lines[len(lines) // 2 :]))
    else:
        import zstandard

        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(lines[:700]) + compressor.compress(lines[700:]))
    return path


def start(prefix: Path, source: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own, with small blocks."""
    words = ["preprocess", "--input", str(source), "--output-prefix", str(prefix), "--append-eod", *flags]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *words], stderr=subprocess.PIPE, text=True)
