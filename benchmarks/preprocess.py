"""Tokens per CPU-second of the whole preprocessing command against Megatron-LM's algorithms, outputs equal.

The text is the standard library of this machine's Python, repeated where more is needed, less the documents that name a
control piece: gigatoken takes `<s>` in a text for a token, to sentencepiece, Megatron's old algorithm and ours it is
text.
The peers are Megatron's old algorithm (`benchmarks/peers/megatron_preprocess.py`), its fast one on gigatoken
(`benchmarks/peers/gigatoken_preprocess.py`), and gigatoken alone as the bound. All run with one worker, in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from megatron_retro.config.data import InputConfig, TrainTokenizerConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.preprocessing.job import SMALLEST_BLOCK
from megatron_retro.data.preprocessing.tokenizer_training import train_tokenizer
from megatron_retro.data.standard_library import standard_library_documents
from megatron_retro.data.token_file import TokenFile
from megatron_retro.runtime.console import say
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, interleave, median_ratio
from megatron_retro.testing.processes import tree_memory_mb

ROOT = Path(__file__).resolve().parents[1]
OLD_TARGETS = {"sentencepiece BPE": 5.0, "byte-level BPE": 5.0, "sentencepiece unigram": 1.0}
ON_GIGATOKEN = ("sentencepiece BPE", "byte-level BPE")
_SCALING_BYTES = 600_000_000
_CONTROLS = ("<s>", "</s>", "<unk>")
_COUNTED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(own.ru_utime + own.ru_stime, others.ru_utime + others.ru_stime)
"""
_SIZES_MB = (100, 1000, 4000)  # corpora whose peak memory is measured


def write_text(path: Path, characters: int) -> Path:
    """JSON lines of about so much text."""
    texts = [document.text for document in standard_library_documents()]
    lines = [json.dumps({"text": text}) + "\n" for text in texts if not any(name in text for name in _CONTROLS)]
    with path.open("w", encoding="utf-8") as stream:
        left = characters
        for line in lines:
            if left <= 0:
                break
            stream.write(line)
            left -= len(line)
    return path


def train_models(folder: Path, source: Path, quick: bool) -> dict[str, list[str]]:
    """Flags of our command for each kind of tokenizer."""
    flags = {}
    for name, algorithm in (("sentencepiece BPE", "bpe"), ("sentencepiece unigram", "unigram")):
        prefix = folder / algorithm
        config = TrainTokenizerConfig(
            tokenizer_output=str(prefix),
            tokenizer_vocab_size=8000 if quick else 16000,
            tokenizer_algorithm=algorithm,
            tokenizer_sample_bytes=4 << 20,
        )
        train_tokenizer(Settings([InputConfig(input=(str(source),)), config]))
        flags[name] = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.model"]
    path = _byte_level(folder, source)
    flags["byte-level BPE"] = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(path)]
    return flags


def _byte_level(folder: Path, source: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()[:400]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    path = folder / "tokenizer.json"
    backend.save(str(path))
    return path


def command(source: Path, prefix: Path, flags: list[str], workers: int) -> list[str]:
    """Our command line."""
    words = ["--input", str(source), "--output-prefix", str(prefix), "--append-eod", "--workers", str(workers)]
    return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *words, *flags]


def peer_command(source: Path, prefix: Path, flags: list[str], workers: int) -> list[str]:
    """The peer's."""
    kind = "sentencepiece" if "SentencePieceTokenizer" in flags else "tokenizers"
    return [
        sys.executable,
        str(ROOT / "benchmarks" / "peers" / "megatron_preprocess.py"),
        *(kind, flags[-1], str(source), str(prefix), str(workers)),
    ]


def fast_peer_command(source: Path, prefix: Path, flags: list[str], *more: str) -> list[str]:
    """Megatron's fast algorithm; with `raw`, gigatoken alone."""
    script = ROOT / "benchmarks" / "peers" / "gigatoken_preprocess.py"
    return [sys.executable, str(script), flags[-1], str(source), str(prefix), *more]


def call(words: list[str]) -> None:
    """Run a command quietly."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr}")


def remove_outputs(prefix: Path) -> None:
    """Those of an earlier run."""
    for path in prefix.parent.glob(f"{prefix.name}_text_document*"):
        path.unlink()


def ours(source: Path, prefix: Path, flags: list[str], workers: int = 1) -> None:
    """Our command, from nothing."""
    remove_outputs(prefix)
    call(command(source, prefix, flags, workers))


def against_the_peers(folder: Path, source: Path, flags: dict[str, list[str]], rounds: int) -> list[Figure]:
    """CPU-seconds of all, per tokenizer."""
    figures = []
    for name, words in flags.items():
        mine, old, fast = folder / "ours", folder / "old", folder / "fast"
        candidates = {
            "ours": lambda mine=mine, words=words: ours(source, mine, words),
            "old": lambda old=old, words=words: call(peer_command(source, old, words, 1)),
        }
        if name in ON_GIGATOKEN:
            raw = fast_peer_command(source, folder / "raw", words, "raw")
            candidates["fast"] = lambda fast=fast, words=words: call(fast_peer_command(source, fast, words))
            candidates["raw"] = lambda raw=raw: call(raw)
        times = interleave(candidates, rounds)
        for prefix in (old, *((fast,) if name in ON_GIGATOKEN else ())):
            for ending in (".bin", ".idx"):
                same = Path(f"{mine}_text_document{ending}").read_bytes() == Path(f"{prefix}{ending}").read_bytes()
                assert same, f"{name}: the outputs differ"
        cpu = {who: time.cpu for who, time in times.items()}
        ratio = median_ratio(cpu["old"], cpu["ours"])
        figures.append(Figure(f"{name}: Megatron's old algorithm against ours", ratio, "x CPU", OLD_TARGETS[name]))
        if name in ON_GIGATOKEN:
            fast_ratio = median_ratio(cpu["fast"], cpu["ours"])
            figures.append(Figure(f"{name}: Megatron's fast algorithm against ours", fast_ratio, "x CPU", 1.0))
            raw_ratio = median_ratio(cpu["ours"], cpu["raw"])
            figures.append(Figure(f"{name}: ours against gigatoken alone", raw_ratio, "x CPU", 1.3, LOWER))
        tokens = TokenFile(old).num_tokens / 1e6
        figures += [Figure(f"{name}: {who}", tokens / time.median_cpu, "M tokens/CPU-s") for who, time in times.items()]
        say(f"{name}: {ratio:.2f}x")
    return figures


def counted(words: list[str]) -> tuple[float, float]:
    """CPU-seconds of a command: its own, and those of its worker processes."""
    done = subprocess.run([words[0], "-c", _COUNTED, *words[1:]], capture_output=True, text=True, check=True)
    own, others = done.stdout.split()[-2:]
    return float(own), float(others)


def scaling(folder: Path, source: Path, flags: list[str], rounds: int) -> list[Figure]:
    """Two workers against one, on text long enough that starting and learning words are a small part.

    By the clock, which other work on the machine lengthens, and by what was counted: with a core for each worker a
    run takes what its first process does alone, half of what the workers do, and half a block at the end, when one
    of them has none left.
    """
    prefix, ratios = folder / "scaling", []
    blocks = -(-source.stat().st_size // SMALLEST_BLOCK)
    times = interleave(
        {str(workers): lambda workers=workers: ours(source, prefix, flags, workers) for workers in (1, 2)}, rounds
    )
    for _ in range(rounds):
        counts = []
        for workers in (1, 2):
            remove_outputs(prefix)
            counts.append(counted(command(source, prefix, flags, workers)))
        (alone, none), (own, others) = counts
        ratios.append((alone + none) / (own + others / 2 + others / blocks / 2))
    return [
        Figure(f"2 workers against 1, {blocks} blocks, by counted CPU-seconds", median(ratios), "x", 1.9),
        Figure("2 workers against 1, by the clock", median_ratio(times["1"].wall, times["2"].wall), "x"),
        Figure("work of 1 worker against that of 2", median_ratio(times["1"].cpu, times["2"].cpu), "x CPU-seconds"),
    ]


def start_up(folder: Path, flags: list[str]) -> list[Figure]:
    """The command on a single document."""
    source = folder / "one.jsonl"
    source.write_text('{"text": "one document"}\n')
    times = interleave({"": lambda: ours(source, folder / "one", flags)}, 5)[""]
    return [
        Figure("start-up, CPU", times.median_cpu, "s", 1.0, LOWER),
        Figure("start-up, by the clock", times.median_wall, "s"),
    ]


def peak_memory_mb(words: list[str]) -> float:
    """The most memory that a command and its workers had."""
    peak = 0.0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.05):
                peak = max(peak, tree_memory_mb(run.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        run.wait()
        done.set()
        watcher.join()
    assert run.returncode == 0
    return peak


def memory(folder: Path, source: Path, flags: list[str], sizes_mb: Iterable[int]) -> list[Figure]:
    """Peak memory of two workers over growing corpora."""
    figures = []
    large, content = folder / "large.jsonl", source.read_bytes()
    for size in sizes_mb:
        with large.open("wb") as stream:
            for _ in range(max(1, round(size * 1e6 / len(content)))):
                stream.write(content)
        for path in folder.glob("memory_text_document*"):
            path.unlink()
        began = time.perf_counter()
        peak = peak_memory_mb(command(large, folder / "memory", flags, 2))
        say(f"{size} MB: {peak:.0f} MB in {time.perf_counter() - began:.0f} s")
        figures.append(Figure(f"peak memory, {size} MB of text, 2 workers", peak, "MB", 300.0 + 2 * 64, LOWER))
    return figures


def run(quick: bool) -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_text(folder / "text.jsonl", 4_000_000 if quick else 24_000_000)
        flags = train_models(folder, source, quick)
        bpe = flags["sentencepiece BPE"]
        figures = against_the_peers(folder, source, flags, 1 if quick else 2)
        if not quick:
            with (folder / "long.jsonl").open("wb") as stream:
                for _ in range(_SCALING_BYTES // source.stat().st_size):
                    stream.write(source.read_bytes())
            figures += scaling(folder, folder / "long.jsonl", bpe, 2)
        figures += start_up(folder, bpe)
        return figures + memory(folder, source, bpe, [20] if quick else _SIZES_MB)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
