"""What every command pays: start-up of the command line, and writing an artifact against writing its bytes alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_retro.artifacts.files import new_directory
from megatron_retro.artifacts.manifest import damage, read_manifest, write_manifest
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, interleave, median_ratio


def run(quick: bool) -> list[Figure]:
    """Start-up against a bare interpreter, artifacts against plain files."""
    rounds = 5 if quick else 15
    return [*start_up(rounds), *artifact_writing(rounds, 16 << 20 if quick else 256 << 20)]


def start_up(rounds: int) -> list[Figure]:
    """`--help` of the program and of its largest verb."""

    def command(*words: str) -> None:
        subprocess.run([sys.executable, *words], check=True, capture_output=True)

    times = interleave(
        {
            "bare": lambda: command("-c", "pass"),
            "help": lambda: command("-m", "megatron_retro.cli.main", "--help"),
            "verb": lambda: command("-m", "megatron_retro.cli.main", "pretrain", "--help"),
        },
        rounds,
        warm_up=1,
    )
    return [
        Figure("megatron-retro --help", times["help"].median_cpu, "s CPU", 0.5, LOWER),
        Figure("megatron-retro pretrain --help", times["verb"].median_cpu, "s CPU", 0.5, LOWER),
        Figure("bare interpreter", times["bare"].median_cpu, "s CPU"),
    ]


def artifact_writing(rounds: int, size: int) -> list[Figure]:
    """An artifact (checksummed, flushed, renamed) against its bytes written and flushed."""
    content = os.urandom(size)
    with tempfile.TemporaryDirectory() as folder:
        artifact, plain = Path(folder) / "artifact", Path(folder) / "plain"

        def ours() -> None:
            with new_directory(artifact, replace=True) as work:
                (work / "data").write_bytes(content)
                write_manifest(work, kind="benchmark", version=1)

        def bare() -> None:
            with plain.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())

        ours()
        if damage(artifact, read_manifest(artifact, kind="benchmark", version=1)):
            raise RuntimeError("the artifact that was written is not intact")
        times = interleave({"ours": ours, "bare": bare}, min(rounds, 7), warm_up=1)
        shutil.rmtree(artifact)
    return [Figure("artifact over plain write", median_ratio(times["ours"].wall, times["bare"].wall), "x wall time")]


if __name__ == "__main__":
    benchmark_main(__doc__, run)
