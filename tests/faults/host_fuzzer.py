"""A fuzzer of `csrc/host`, run by a Python under the address and undefined-behaviour sanitizers.

`host_fuzzer.py data|retrieval LIBRARY SEED CASES`: sound inputs, then some of their numbers replaced by edges
or by random ones, for every entry point. Errors are answers; the sanitizers end the process at the first wrong access.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

EDGES = (-1, 0, 1, 2, 7, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63), -(1 << 40), 255, 256)
Array = np.ndarray[Any, np.dtype[Any]]


def loaded(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fuzzer:
    """Cases of one seed."""

    def __init__(self, module: Any, seed: int) -> None:
        self.module, self.dice = module, np.random.default_rng(seed)
        self.results: Counter[str] = Counter()

    def number(self, low: int, high: int) -> int:
        """Mostly a legal number, sometimes an edge."""
        if self.dice.random() < 0.1:
            return int(self.dice.choice(np.array(EDGES, object)))
        return int(self.dice.integers(low, high))

    def edited(self, array: Array) -> Array:
        """Some numbers of an array replaced; sometimes the array is cut."""
        result = array.copy()
        limits = np.iinfo(result.dtype)
        for _ in range(int(self.dice.integers(0, 4))):
            if result.size:
                edge = int(self.dice.choice(np.array(EDGES, object)))
                result.reshape(-1)[self.dice.integers(result.size)] = min(max(edge, limits.min), limits.max)
        if result.ndim == 1 and self.dice.random() < 0.1:
            result = result[: self.dice.integers(0, len(result) + 1)].copy()
        return result

    def run(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
            self.results[f"{name}: answered"] += 1
        except (ValueError, TypeError, IndexError, OverflowError, MemoryError, RuntimeError) as error:
            self.results[f"{name}: {type(error).__name__}"] += 1

    def data_case(self) -> None:
        """A database of two corpora with damaged indexes."""
        dice, length = self.dice, int(self.dice.integers(1, 20))
        dtype = np.dtype(dice.choice(["u2", "i4"]))
        corpora, before, chunks = [], 0, [0]
        for _ in range(2):
            sizes = dice.integers(0, 60, dice.integers(1, 12))
            stream = dice.integers(0, 257, sizes.sum()).astype(dtype)
            pointers = np.append(0, np.cumsum(sizes))[:-1] * dtype.itemsize
            documents = np.arange(len(sizes) + 1)
            corpora.append(("file", stream, self.edited(pointers), self.edited(documents), self.number(0, 2), before))
            chunks += (chunks[-1] + np.cumsum(-(-sizes // length))).tolist()
            before += len(sizes)
        counts = self.edited(np.array(chunks, np.int64))
        offsets = np.array([self.number(0, 500) for _ in range(8)])
        for file in corpora:
            self.run("token_documents", lambda file=file: self.module.token_documents(*file[:4], offsets))
        try:
            database = self.module.ChunkDatabase("path", corpora, counts, length, self.number(-1, 257))
        except (ValueError, TypeError, OverflowError) as error:
            self.results[f"database: {type(error).__name__}"] += 1
            return
        sound = dice.integers(-1, max(chunks[-1], 1), 12)
        ids = np.array([self.number(-1, max(chunks[-1], 1)) for _ in range(12)]) if dice.random() < 0.3 else sound
        rows = int(dice.integers(1, 40))
        self.run("gather", lambda: database.gather(ids, rows, dtype.itemsize, int(dice.integers(1, 3))))
        self.run("documents", lambda: database.documents(ids))
        packed = dice.integers(0, 256, (4, 5 * 3)).astype(np.uint8)
        packed[:, 2::5] = packed[:, 3::5] = packed[:, 4::5] = 0
        excluded = self.edited(np.array([[0, 3], [2, 5]]))
        limits = dice.integers(0, 1 << 62, dice.choice([0, 2, 3])).astype(np.uint64)
        flag = bool(dice.integers(2))
        self.run("select", lambda: database.select(packed, excluded, int(dice.integers(0, 6)), limits, flag, 1))

    def retrieval_case(self) -> None:
        """Texts, candidates and scores whose shapes need not fit each other."""
        dice, module = self.dice, self.module
        rows, width, others, length = (int(dice.integers(0, most)) for most in (5, 20, 4, 30))
        slip = int(dice.random() < 0.2)
        texts = self.edited(dice.integers(0, 50, (rows, width)).astype(np.int32))
        present = dice.random((rows, width + slip)) < 0.9
        found = self.edited(dice.integers(0, 50, (rows, others, length)).astype(np.int32))
        there = dice.random((rows + slip, others, length)) < 0.9
        weights = dice.random(50).astype(np.float32)
        self.run(
            "embed",
            lambda: module.embed_hashed(
                texts, present, (1, 2, 3)[: dice.integers(4)], int(dice.choice([0, 1, 8, 64, 100])), 1
            ),
        )
        self.run("runs", lambda: module.longest_common_runs(texts, present, found, there, 1))
        self.run("overlaps", lambda: module.token_overlaps(texts, present, found, there, 1))
        self.run("bm25", lambda: module.bm25_scores(texts, present, found, there, weights, 1.2, 0.75, 10.0, 1))
        ids = self.edited(dice.integers(-1, 30, (rows, others)))
        first, last = self.edited(dice.integers(0, 30, rows)), self.edited(dice.integers(0, 30, rows))
        self.run("keep", lambda: module.keep_other_documents(ids, first, last, self.number(0, 9) % 1000))
        vectors = dice.integers(0, 1 << 16, (30, 8 + slip)).astype(np.uint16)
        queries = dice.random((rows, 8)).astype(np.float32)
        self.run("distances", lambda: module.candidate_distances(queries, ids, vectors, 1))
        self.run("top", lambda: self._top(rows, others))

    def _top(self, rows: int, others: int) -> None:
        dice = self.dice
        top = self.module.TopCandidates(rows, int(dice.integers(0, 6)), 1)
        if dice.random() < 0.5:
            top.exclude(np.zeros(rows, np.int64), np.full(rows, 3))
        chosen = np.array([self.number(0, max(rows, 1)) for _ in range(int(dice.integers(0, 4)))], np.int64)
        products = dice.random((len(chosen), others)).astype(np.float32)
        offsets, ids = dice.random(others).astype(np.float32), np.arange(others)
        top.offer(chosen, products, offsets, ids)
        bits = dice.integers(0, 1 << 16, (len(chosen), others + int(dice.integers(2)))).astype(np.uint16)
        shape = (max(rows, 1) + int(dice.random() < 0.2) - 1, 8)
        vectors = dice.random((others, 8)).astype(np.float32)
        top.offer_rounded(chosen, bits, offsets, ids, dice.random(shape).astype(np.float32), vectors)
        top.best()


def main(words: list[str]) -> None:
    """Run the cases, then say how many of each kind were answered or refused."""
    fuzzer = Fuzzer(loaded(words[1]), int(words[2]))
    case = fuzzer.data_case if words[0] == "data" else fuzzer.retrieval_case
    for _ in range(int(words[3])):
        case()
    for name, count in sorted(fuzzer.results.items()):
        print(f"{count:8d}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
