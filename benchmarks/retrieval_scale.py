"""What a whole build costs at three sizes, against what its plan said: bytes of files, CPU-seconds, memory per stage.

Every stage runs as its own process on one thread with one gigabyte allowed. Text is made of phrases that come back
within topics. CPU-seconds are those above the start of the program; memory is anonymous (what is mapped from files
can be dropped by the system at any time).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.sections import ALL_SECTIONS, INDEX_SECTIONS
from megatron_retro.data.token_writer import TokenFileWriter
from megatron_retro.retrieval.build_estimate import BuildEstimate, estimate_build
from megatron_retro.retrieval.project import Project
from megatron_retro.runtime.console import say
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main

SIZES, QUICK_SIZES = (250_000, 1_000_000, 4_000_000), (20_000, 40_000, 80_000)
STAGES = ("train", "encode", "merge", "query", "verify")
CHUNK, DOCUMENT_CHUNKS, PHRASE, TOPICS, PHRASES = 64, 10, 16, 2000, 64
QUERIED = 50_000


@dataclass(frozen=True)
class Cost:
    """What one process used."""

    cpu: float
    anonymous_bytes: float


def write_corpus(prefix: Path, chunks: int) -> str:
    """Documents of ten chunks; each draws its phrases from one topic, a tenth of the tokens at random."""
    random = np.random.default_rng(0)
    phrases = random.integers(0, 30_000, (TOPICS, PHRASES, PHRASE)).astype(np.uint16)
    count = chunks // DOCUMENT_CHUNKS
    with TokenFileWriter(prefix, "uint16") as writer:
        for start in range(0, count, 5000):
            documents = min(5000, count - start)
            drawn = random.integers(0, PHRASES, (documents, DOCUMENT_CHUNKS * CHUNK // PHRASE))
            tokens = phrases[random.integers(0, TOPICS, documents)[:, None], drawn].reshape(documents, -1)
            noise = random.random(tokens.shape) < 0.1
            tokens[noise] = random.integers(0, 30_000, int(noise.sum()))
            stream = np.concatenate([tokens, np.full((documents, 1), 50_256, np.uint16)], axis=1)
            lengths = np.full(documents, stream.shape[1], np.int32)
            writer.add_documents(stream.reshape(-1), lengths, np.ones(documents, np.int64))
        writer.finalize()
    return str(prefix)


def words(folder: Path, corpus: str, chunks: int) -> list[str]:
    """The flags of the build."""
    lists = 2 ** round(np.log2(2 * chunks**0.5))
    return [
        *("--retro-project-dir", str(folder / "project"), "--retro-database-corpus", corpus),
        *("--no-retro-database-eod"),
        *("--retro-embedder-dimension", "128", "--retro-index-str", f"IVF{lists},Flat", "--retro-query-nprobe", "16"),
        *("--retro-memory-gb", "1", "--retro-query-rows", f"0:{min(QUERIED, chunks // 2)}"),
        *("--retro-verify-queries", "200", "--retro-verify-rows", "1000000"),
    ]


def run_stage(flags: list[str], stage: str) -> Cost:
    """Run one stage in a process of its own, watching its memory."""
    command = [sys.executable, "-m", "megatron_retro.cli.main", "build-retrieval", *flags, "--retro-tasks", stage]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    peak = 0.0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{stage} failed: {' '.join(command)}")
    return Cost(usage.ru_utime + usage.ru_stime, peak)


def anonymous_bytes(process: int) -> float:
    """What a process holds that is no file."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def planned(flags: list[str]) -> BuildEstimate:
    """What the plan stage would print."""
    settings, _ = parse_settings("benchmark", INDEX_SECTIONS, flags, all_sections=ALL_SECTIONS)
    return estimate_build(Project(settings))


def file_errors(plan: BuildEstimate, root: Path) -> float:
    """Largest difference between planned and written bytes, as a share; codes may differ by their headers."""
    errors = []
    for name, expected in plan.files.items():
        path = root / name.split(" ")[0]
        found = sum(file.stat().st_size for file in path.rglob("*") if file.name != "manifest.json")
        size = path.stat().st_size if path.is_file() else found
        say(f"  {name}: planned {expected:,}, written {size:,}")
        if name != "index/codes":
            errors.append(abs(size - expected) / max(expected, 1))
    return max(errors)


def measure(chunks: int) -> list[Figure]:
    """Figures of one size."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = words(folder, write_corpus(folder / "corpus", chunks), chunks)
        plan = planned(flags)
        expected = {cost.stage: cost.seconds for cost in plan.costs}
        costs = {stage: run_stage(flags, stage) for stage in STAGES}
        start = run_stage(flags, "encode").cpu
        for stage, cost in costs.items():
            spent = max(cost.cpu - start, 0.01)
            taken = f"took {spent:.1f} CPU-s, {cost.anonymous_bytes / 1e6:.0f} MB"
            say(f"  {stage}: planned {expected[stage]:.1f} s, {taken}")
            figures.append(Figure(f"{chunks} chunks: {stage}", spent, "CPU-seconds"))
            memory = cost.anonymous_bytes / 1e9
            figures.append(Figure(f"{chunks} chunks: {stage}, anonymous memory", memory, "GB", 1.0, LOWER))
        total = sum(max(cost.cpu - start, 0.0) for cost in costs.values())
        ratio = total / sum(expected.values())
        figures.append(Figure(f"{chunks} chunks: all stages, measured over planned", ratio, "x", 1.3, LOWER))
        error = file_errors(plan, folder / "project")
        figures.append(Figure(f"{chunks} chunks: files, largest error of the plan", error, "share", 0.0, LOWER))
        shutil.rmtree(folder / "project")
    return figures


def run(quick: bool) -> list[Figure]:
    """All sizes."""
    figures: list[Figure] = []
    for chunks in QUICK_SIZES if quick else SIZES:
        say(f"{chunks:,} chunks")
        figures += measure(chunks)
    return figures


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    benchmark_main(__doc__, run)
