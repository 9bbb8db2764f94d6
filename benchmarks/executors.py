"""CPU-seconds that `--executor ray` adds to the bare workers of one `preprocess`, everything of Ray's counted.

A Ray of this machine runs beforehand. A run's CPU-seconds are those of all processes below this one, Ray's daemons
among them, between its start and its end; the bare workers are the same command twice, `--shard 0/2` and `1/2`. Both
are run on one document, too: what Ray adds to that is its start, which a longer run has once. Daemons work by the
clock: on a machine that does other work they take a larger share.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median

from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main

sys.path.insert(0, str(Path(__file__).parent))
from preprocess import command, remove_outputs, train_models, write_text

WORKERS, BYTES, ROUNDS = 2, 400_000_000, 2
_TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """The CPU-seconds of every process below this one, looked at ten times a second.

    Ray's raylet does not wait for its children, so the system adds theirs to nobody's when they end.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_often)

    def __enter__(self) -> Watch:
        self._look()
        self._before = self.total()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def total(self) -> float:
        """Of all that were seen."""
        return sum(self._seen.values())

    def seconds(self) -> float:
        """Since the beginning."""
        return self.total() - self._before

    def _look_often(self) -> None:
        while not self._done.wait(0.1):
            self._look()

    def _look(self) -> None:
        for process in below(os.getpid()):
            with suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                self._seen[process, fields[19]] = sum(map(int, fields[11:13])) / _TICKS


def below(process: int) -> Iterator[int]:
    """All processes that a process has started, directly or not."""
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in tasks.read_text(encoding="utf-8").split():
                yield int(child)
                yield from below(int(child))


def bare(words: list[str]) -> None:
    """The workers, and nothing else."""
    runs = [subprocess.Popen([*words, "--shard", f"{number}/{WORKERS}"]) for number in range(WORKERS)]
    assert all(run.wait() == 0 for run in runs)


def on_ray(words: list[str], address: str) -> None:
    """The same by Ray."""
    more = ("--executor", "ray", "--ray-address", address, "--executor-workers", str(WORKERS))
    subprocess.run([*words, *more], check=True)


def counted(work: Callable[[], None], prefix: Path) -> float:
    """CPU-seconds of a run from nothing."""
    remove_outputs(prefix)
    with Watch() as watch:
        work()
    return watch.seconds()


def run(quick: bool) -> Iterator[Figure]:
    """The share that Ray adds, whole and without its start."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the bare workers
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as room:
        folder = Path(room)
        source = write_text(folder / "text.jsonl", 4_000_000 if quick else 24_000_000)
        flags = train_models(folder, source, quick)["byte-level BPE"]
        (folder / "one.jsonl").write_text('{"text": "one document"}\n')
        with (folder / "long.jsonl").open("wb") as stream:
            for _ in range(1 if quick else BYTES // source.stat().st_size):
                stream.write(source.read_bytes())
        ray = Cluster(initialize_head=True, head_node_args={"num_cpus": WORKERS, "include_dashboard": False})
        pairs: dict[str, list[tuple[float, float]]] = {"one": [], "long": []}
        try:
            for _ in range(1 if quick else ROUNDS):
                for name, found in pairs.items():
                    prefix = folder / name
                    words = command(folder / f"{name}.jsonl", prefix, flags, 1)
                    alone = counted(partial(bare, words), prefix)
                    found.append((alone, counted(partial(on_ray, words, ray.address), prefix)))
        finally:
            ray.shutdown()
        start = median(with_ray - alone for alone, with_ray in pairs["one"])
        megabytes = (folder / "long.jsonl").stat().st_size / 1e6
        yield Figure("what Ray adds to one document", start, "CPU-s")
        yield Figure(f"bare workers, {megabytes:.0f} MB", median(alone for alone, _ in pairs["long"]), "CPU-s")
        ratios = [with_ray / alone for alone, with_ray in pairs["long"]]
        yield Figure(f"Ray over bare workers, {megabytes:.0f} MB", median(ratios), "x CPU-s", 1.02, LOWER)
        later = [(with_ray - start) / alone for alone, with_ray in pairs["long"]]
        yield Figure("Ray over bare workers, without its start", median(later), "x CPU-s", 1.02, LOWER)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
