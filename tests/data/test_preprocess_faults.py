"""Preprocessing is killed, starved of disk and shared by machines: the bytes are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.cli.main import main
from megatron_retro.data.preprocessing import job as job_module
from megatron_retro.data.preprocessing.blocks import BlockTokenizer
from megatron_retro.testing.corpora import random_text, small_sentencepiece, write_json_lines
from megatron_retro.testing.preprocessing_runs import SCRIPT, compressed, files, preprocess, records, start
from megatron_retro.testing.processes import tree_memory_mb


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "a.model"
    small_sentencepiece(path)
    return path


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(9)
    found = [{"text": random_text(generator, 150)} for _ in range(600)]
    return write_json_lines(tmp_path_factory.mktemp("larger") / "a.jsonl", found)


def test_mpirun_gives_every_process_its_part(tmp_path: Path, larger: Path) -> None:
    launcher = shutil.which("mpirun")
    if launcher is None:
        pytest.skip("no mpirun on this machine")
    assert start(tmp_path / "whole", larger, "--workers", "1").wait() == 0
    words = [launcher, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", SCRIPT, "preprocess"]
    words += ["--input", str(larger), "--output-prefix", str(tmp_path / "o"), "--append-eod", "--workers", "1"]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert files(tmp_path / "o") == files(tmp_path / "whole")


def test_killed_at_any_moment_and_resumed_the_bytes_are_the_same(
    tmp_path: Path, larger: Path, model: Path, count: Callable[[int, int], int]
) -> None:
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model), "--workers", "2"]
    began = time.monotonic()
    assert start(tmp_path / "whole", larger, *flags).wait() == 0
    whole_run = time.monotonic() - began
    wanted = files(tmp_path / "whole")
    generator = random.Random(0)
    killed = 0
    for number in range(count(5, 50)):
        prefix = tmp_path / str(number)
        run = start(prefix, larger, *flags)
        time.sleep(whole_run * generator.uniform(0.3, 1.0))
        run.kill()
        killed += run.wait() == -signal.SIGKILL
        resumed = start(prefix, larger, *flags)
        assert resumed.wait() == 0, resumed.communicate()
        assert files(prefix) == wanted
        assert sorted(path.name for path in tmp_path.glob(f"{number}*.unfinished")) == []
    assert killed > 0


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_killed_worker_is_noticed_and_its_part_done_again(tmp_path: Path, larger: Path, model: Path) -> None:
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model), "--workers", "2"]
    assert start(tmp_path / "whole", larger, *flags).wait() == 0
    run = start(tmp_path / "hurt", larger, *flags)
    deadline = time.monotonic() + 20
    while not (workers := children(run.pid)) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed_at = time.monotonic()
    os.kill(workers[0], signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0 and "was killed by signal 9" in said
    assert time.monotonic() - killed_at < 30
    assert files(tmp_path / "hurt") == files(tmp_path / "whole")


def test_a_signal_is_heard_at_a_block_s_end(tmp_path: Path, larger: Path, model: Path) -> None:
    """By one process and by a pool of them, with the code that asks for a new start."""
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    for workers, number in (("1", signal.SIGTERM), ("2", signal.SIGUSR1)):
        run = start(tmp_path / workers, larger, *flags, "--workers", workers)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"{workers}*.unfinished/claims/*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(run.pid, number)
        _, said = run.communicate(timeout=60)
        assert run.returncode == 75 and "finished blocks are kept" in said, said
        assert start(tmp_path / workers, larger, *flags, "--workers", workers, "--resume").wait() == 0
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_a_part_that_kills_every_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", records(8, 60))
    monkeypatch.setattr(job_module, "SMALLEST_BLOCK", 2000)
    make = BlockTokenizer.tokenize

    def deadly(self: BlockTokenizer, block: int, report: Any) -> None:
        if block == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        make(self, block, report)

    monkeypatch.setattr(BlockTokenizer, "tokenize", deadly)
    assert preprocess(tmp_path / "o", [source], "--workers", "2") == 2
    monkeypatch.setattr(BlockTokenizer, "tokenize", make)
    assert preprocess(tmp_path / "o", [source], "--workers", "2") == 0
    assert preprocess(tmp_path / "p", [source]) == 0
    assert files(tmp_path / "o") == files(tmp_path / "p")


def test_workers_of_many_machines_share_one_run(tmp_path: Path, larger: Path) -> None:
    assert start(tmp_path / "whole", larger, "--workers", "1").wait() == 0
    runs = [start(tmp_path / "shared", larger, "--workers", "1", "--shard", f"{n}/3") for n in range(3)]
    said = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert files(tmp_path / "shared") == files(tmp_path / "whole")
    assert not Path(f"{tmp_path}/shared.unfinished").exists()
    assert sum("finished by another worker" in text or "nothing to do" in text for text in said) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=1m tmpfs {place} 2>/dev/null") != 0:
        pytest.skip("this process may not mount a file system")
    yield place
    os.system(f"umount {place}")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_in_the_middle_is_named_and_resumed_from(
    small_disk: Path, tmp_path: Path, larger: Path, workers: str
) -> None:
    """Too little room for the pieces, then for the result, then enough: nothing half-written has a final name."""
    assert start(tmp_path / "whole", larger, "--workers", "1").wait() == 0
    wanted, ballast = files(tmp_path / "whole"), small_disk / "ballast"
    for kept in (900_000, 500_000):
        ballast.write_bytes(bytes(kept))
        run = start(small_disk / "o", larger, "--workers", workers)
        _, said = run.communicate(timeout=60)
        assert run.returncode == 2 and "the disk is full" in said and "Traceback" not in said, said
        assert not list(small_disk.glob("o_text_document.*"))
        ballast.unlink()
    assert list((small_disk / "o.unfinished").glob("*.json"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert start(small_disk / "o", larger, "--workers", workers).wait() == 0
    assert files(small_disk / "o") == wanted
    assert sorted(path.name for path in small_disk.iterdir() if not path.name.startswith("o_text_document")) == []


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_compressed_files_that_are_finished_are_not_read_again(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work on compressed input is resumed file by file, or frame by frame: these have two each."""
    monkeypatch.setattr(job_module, "SMALLEST_BLOCK", 1)
    lines = [write_json_lines(tmp_path / "a.jsonl", records(number, 30)).read_bytes() for number in range(4)]
    sources = [compressed(tmp_path / f"{number}{ending}", content) for number, content in enumerate(lines)]
    assert preprocess(tmp_path / "whole", sources) == 0
    make, made = BlockTokenizer.tokenize, list[int]()

    def stopping(self: BlockTokenizer, block: int, report: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        make(self, block, report)
        made.append(block)

    monkeypatch.setattr(BlockTokenizer, "tokenize", stopping)
    assert preprocess(tmp_path / "o", sources) != 0
    monkeypatch.setattr(
        BlockTokenizer, "tokenize", lambda self, block, report: (make(self, block, report), made.append(block))
    )
    assert preprocess(tmp_path / "o", sources) == 0
    assert sorted(made) == list(range(8 if ending.endswith("zst") else 4))
    assert files(tmp_path / "o") == files(tmp_path / "whole")


def test_token_files_are_merged_by_a_flag(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts = [write_json_lines(tmp_path / f"{number}.jsonl", records(number, 40)) for number in range(2)]
    for number, part in enumerate(parts):
        assert preprocess(tmp_path / str(number), [part], "--append-eod") == 0
    assert preprocess(tmp_path / "both", parts, "--append-eod") == 0
    prefixes = [str(tmp_path / f"{number}_text_document") for number in range(2)]
    words = ["preprocess", "--merge-token-files", *prefixes, "--output-prefix"]
    assert main([*words, str(tmp_path / "joined_text_document"), "--verify"]) == 0
    assert "joined_text_document: verified" in capfd.readouterr().err
    assert files(tmp_path / "joined") == files(tmp_path / "both")
    assert main([*words, str(tmp_path / "joined_text_document")]) == 2
    assert main(["preprocess", "--merge-token-files", *prefixes]) == 2
    assert "exists already" in capfd.readouterr().err


@pytest.mark.full
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, model: Path) -> None:
    """100 MB and 1 GB of text by two workers."""
    generator = random.Random(3)
    text = "".join(json.dumps({"text": random_text(generator, 400)}) + "\n" for _ in range(4000)).encode()
    peaks = []
    for size in (100_000_000, 1_000_000_000):
        source = tmp_path / "large.jsonl"
        with source.open("wb") as stream:
            for _ in range(size // len(text)):
                stream.write(text)
        words = ["--input", str(source), "--output-prefix", str(tmp_path / str(size)), "--workers", "2"]
        flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
        run = subprocess.Popen([sys.executable, "-m", "megatron_retro.cli.main", "preprocess", *words, *flags])
        peaks.append(0.0)
        while run.poll() is None:
            peaks[-1] = max(peaks[-1], tree_memory_mb(run.pid))
            time.sleep(0.05)
        assert run.returncode == 0
    assert peaks[1] < peaks[0] * 1.1 + 10 and peaks[1] < 300 + 2 * 64
