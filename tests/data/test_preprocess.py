"""Preprocessing writes Megatron's bytes whatever the workers and formats, and names what it cannot use."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.cli.main import main
from megatron_retro.data.preprocessing import job as job_module
from megatron_retro.data.preprocessing import run
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from megatron_retro.testing.corpora import (
    megatron_documents,
    small_sentencepiece,
    write_json_lines,
    write_reference_token_file,
)
from megatron_retro.testing.preprocessing_runs import compressed, files, preprocess, records

Run = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "a.model"
    small_sentencepiece(path)
    return path


def expected(folder: Path, found: Sequence[dict[str, Any]], encode: Any, eod: int | None, key: str = "text") -> Any:
    lines = [json.dumps(record) for record in found]
    write_reference_token_file(folder / "ref", megatron_documents(lines, key, encode, eod), "uint16")
    return (folder / "ref.bin").read_bytes(), (folder / "ref.idx").read_bytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("eod", [True, False])
def test_the_bytes_are_megatrons_for_any_number_of_workers(tmp_path: Path, model: Path, eod: bool) -> None:
    found = records(0, 120)
    source = write_json_lines(tmp_path / "a.jsonl", found)
    tokenizer = SentencePieceTokenizer(model)
    wanted = expected(tmp_path, found, tokenizer.encode, tokenizer.eod if eod else None)
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    flags += ["--append-eod"] if eod else []
    for workers in ("1", "2", "5"):
        assert preprocess(tmp_path / workers, [source], *flags, "--workers", workers, "--verify") == 0
        assert files(tmp_path / workers) == wanted
        assert not (tmp_path / f"{workers}.unfinished").exists()


@pytest.mark.usefixtures("small_blocks")
def test_several_keys_and_several_inputs(tmp_path: Path) -> None:
    first, second = records(1, 30), records(2, 20)
    for record in first + second:
        record["title"] = f"title {record['id']}"
    paths = [write_json_lines(tmp_path / "a.jsonl", first), write_json_lines(tmp_path / "b.jsonl", second)]
    assert preprocess(tmp_path / "o", [tmp_path / "*.jsonl"], "--json-keys", "text", "title") == 0
    assert preprocess(tmp_path / "p", paths, "--json-keys", "text", "title") == 0
    for key in ("text", "title"):
        wanted = expected(tmp_path, first + second, ByteTokenizer().encode, None, key)
        assert files(tmp_path / "o", key) == wanted == files(tmp_path / "p", key)


@pytest.mark.usefixtures("small_blocks")
def test_plain_text_is_a_document_per_file_or_per_line(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = {f"{number:02d}.txt": f"file {number}\nline two\n" * (number + 1) for number in range(20)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    assert preprocess(tmp_path / "o", [folder]) == 0
    file = TokenFile(f"{tmp_path}/o_text_document")
    assert [bytes(file.document(n).astype(np.uint8)).decode() for n in range(20)] == list(texts.values())
    assert preprocess(tmp_path / "p", [folder / "03.txt"], "--text-documents", "line") == 0
    file = TokenFile(f"{tmp_path}/p_text_document")
    assert [bytes(file.document(n).astype(np.uint8)).decode() for n in range(8)] == ["file 3", "line two"] * 4


@pytest.mark.parametrize("block", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("text", [b"", b"\n", b"ab\n", b"ab", b"a\nbb\n\nccc\r\nd", b"x" * 90 + b"\ny\n", b"\n" * 9])
def test_every_line_is_read_once_wherever_ranges_are_cut(tmp_path: Path, text: bytes, block: int) -> None:
    from megatron_retro.data.preprocessing.job import InputRange, PreprocessingJob, ReadOptions, find_inputs
    from megatron_retro.data.preprocessing.records import read_range

    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    job = PreprocessingJob(find_inputs([str(path)]), ReadOptions(("text",), "file", 20, "stop"), False, "", "uint16")
    ranges = range(0, len(text), block)
    got = [record for s in ranges for record in read_range(job, InputRange(0, s, min(s + block, len(text))))]
    lines = text.split(b"\n")
    wanted = [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    assert [record.length for record in got] == [len(line) for line in wanted]
    assert [record.content for record in got] == [line if len(line) <= 21 else None for line in wanted]


@pytest.mark.usefixtures("small_blocks")
def test_shards_cut_the_documents_and_join_again(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", records(4, 50))
    assert preprocess(tmp_path / "whole", [source]) == 0
    assert preprocess(tmp_path / "cut", [source], "--shards", "3", "--verify") == 0
    whole = TokenFile(f"{tmp_path}/whole_text_document")
    parts = [TokenFile(f"{tmp_path}/cut_{n:05d}-of-00003_text_document") for n in range(3)]
    assert [part.num_documents for part in parts] == [16, 17, 17]
    assert np.concatenate([part.stream for part in parts]).tolist() == whole.stream.tolist()


@pytest.mark.usefixtures("small_blocks")
def test_shards_are_joined_by_several_workers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", records(4, 50))
    flags = ("--shards", "3", "--shuffle-documents", "1")
    assert preprocess(tmp_path / "one", [source], *flags) == 0
    (tmp_path / "begun").mkdir()
    join_target = run.join_target

    def after_another_began(*words: Any) -> None:
        (tmp_path / "begun" / f"{words[-1]}-{os.getpid()}").touch()
        while len(list((tmp_path / "begun").iterdir())) < 2:
            time.sleep(0.01)
        join_target(*words)

    monkeypatch.setattr(run, "join_target", after_another_began)
    assert preprocess(tmp_path / "two", [source], *flags, "--workers", "2") == 0
    begun = [path.name.split("-") for path in (tmp_path / "begun").iterdir()]
    assert sorted(number for number, _ in begun) == ["0", "1", "2"] and len({process for _, process in begun}) == 2
    assert all(files(tmp_path / f"one_{n:05d}-of-00003") == files(tmp_path / f"two_{n:05d}-of-00003") for n in range(3))


@pytest.mark.usefixtures("small_blocks")
def test_shuffling_is_a_permutation_of_the_documents(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", records(5, 80))
    for name, flags in {"plain": [], "s1": ["--shuffle-documents", "1"], "s2": ["--shuffle-documents", "2"]}.items():
        assert preprocess(tmp_path / name, [source], *flags, "--append-eod") == 0
    assert preprocess(tmp_path / "s1w", [source], "--shuffle-documents", "1", "--append-eod", "--workers", "3") == 0
    names = ("plain", "s1", "s2")
    kept = {n: TokenFile(f"{tmp_path}/{n}_text_document") for n in names}
    documents = {n: [tuple(file.document(d).tolist()) for d in range(80)] for n, file in kept.items()}
    assert sorted(documents["plain"]) == sorted(documents["s1"]) == sorted(documents["s2"])
    assert documents["plain"] != documents["s1"] != documents["s2"]
    assert files(tmp_path / "s1") == files(tmp_path / "s1w")


GOOD = b'{"text": "fine"}\n'
BAD: dict[str, tuple[bytes, str]] = {
    "malformed": (b'{"text": "no end\n', "malformed JSON"),
    "not an object": (b"[1, 2]\n", "a JSON list"),
    "null": (b'{"text": null}\n', "'text' is null"),
    "number": (b'{"text": 3}\n', "'text' is int"),
    "missing key": (b'{"body": "x"}\n', "no key 'text'"),
    "surrogate": (b'{"text": "a\\ud800b"}\n', "surrogate"),
    "utf8": (b'{"text": "\xff"}\n', "invalid UTF-8 at byte 27"),
    "raw nul": (b'{"text": "a\x00b"}\n', "malformed JSON"),
    "nul padding": (b"\x00" * 40 + b"\n", "malformed JSON"),
    "too long": (b'{"text": "' + b"x" * 300 + b'"}\n', "more than --max-document-bytes"),
    "deep": (b"[" * 240 + b"\n", "malformed JSON"),
}
LIMIT = ("--max-document-bytes", "250")


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_record_stops_the_run_by_name(
    tmp_path: Path, name: str, workers: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "SMALLEST_BLOCK", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + BAD[name][0] + GOOD)
    assert preprocess(tmp_path / "o", [path], *LIMIT, "--workers", workers) == 2
    message = capfd.readouterr().err
    assert f"{path}, byte 17, line 2: " in message and BAD[name][1] in message and "--on-error skip" in message
    assert not Path(f"{tmp_path}/o_text_document.idx").exists()


def test_bad_records_are_skipped_counted_and_set_aside(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(GOOD + bad for bad, _ in BAD.values()))
    assert preprocess(tmp_path / "o", [path], *LIMIT, "--on-error", "skip") == 0
    assert f"{len(BAD)} records were refused" in capfd.readouterr().err
    assert Path(f"{tmp_path}/o.refused.jsonl").read_bytes() == b"".join(bad for bad, _ in BAD.values())
    reasons = Path(f"{tmp_path}/o.refused.txt").read_text().splitlines()
    assert len(reasons) == len(BAD)
    assert all(reason in line for line, (_, reason) in zip(reasons, BAD.values(), strict=True) if "27" not in reason)
    assert TokenFile(f"{tmp_path}/o_text_document").num_documents == len(BAD)


def test_line_ends_blank_lines_and_escaped_nul_are_no_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n\r\n\n{"text": "tw\\u0000o"}\n   \n{"text": ""}\n{"text": "\\ud83d\\ude00"}')
    assert preprocess(tmp_path / "o", [path], "--append-eod") == 0
    file = TokenFile(f"{tmp_path}/o_text_document")
    wanted = [b"one", b"tw\0o", b"", "😀".encode()]
    assert [bytes(file.document(n)[:-1].astype(np.uint8)) for n in range(file.num_documents)] == wanted


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, ending: str) -> None:
    content = "\ufefffine" if ending == ".txt" else '\ufeff{"text": "fine"}\n'
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content.encode()) if ending.endswith(".gz") else content.encode())
    assert preprocess(tmp_path / "o", [path]) == 0
    assert bytes(TokenFile(f"{tmp_path}/o_text_document").document(0).astype(np.uint8)) == b"fine"


def test_a_record_is_corrected_and_the_same_command_runs(tmp_path: Path) -> None:
    """A run that ended before its first block is no unfinished work."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD["null"][0])
    assert preprocess(tmp_path / "o", [path]) == 2
    path.write_bytes(GOOD)
    assert preprocess(tmp_path / "o", [path]) == 0


def test_a_worker_that_fails_leaves_the_folder_in_which_others_work(tmp_path: Path) -> None:
    """What they find there besides the job is theirs; without any, a run of other settings or input takes it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD["null"][0])
    for shard in ("0/2", "1/2"):
        assert preprocess(tmp_path / "o", [path], "--shard", shard) == 2
        assert sorted(name for name in os.listdir(tmp_path / "o.unfinished") if name != "claims") == ["plan.json"]
    path.write_bytes(GOOD)
    assert preprocess(tmp_path / "o", [path], "--append-eod") == 0
    assert not (tmp_path / "o.unfinished").exists()


def test_after_hours_of_work_a_bad_record_is_set_aside_and_the_rest_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished under --on-error stop is the same under skip; the other way round it need not be."""
    monkeypatch.setattr(job_module, "SMALLEST_BLOCK", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + BAD["null"][0] + GOOD)
    assert preprocess(tmp_path / "o", [path], "--workers", "1") == 2
    assert Path(f"{tmp_path}/o.unfinished/000000.json").exists()
    assert preprocess(tmp_path / "o", [path], "--append-eod") == 2
    assert "other append-eod False" in capfd.readouterr().err
    assert preprocess(tmp_path / "o", [path], "--on-error", "skip") == 0
    assert TokenFile(f"{tmp_path}/o_text_document").num_documents == 2


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_cut_compressed_file_ends_the_run(
    tmp_path: Path, ending: str, cut: int, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = write_json_lines(tmp_path / "a.jsonl", records(6, 40)).read_bytes()
    path = compressed(tmp_path / f"b{ending}", lines)
    path.write_bytes(path.read_bytes()[:-cut])
    assert preprocess(tmp_path / "o", [path], "--on-error", "skip") == 2
    assert f"{path} is cut or damaged" in capfd.readouterr().err


def test_what_cannot_begin_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n\n")
    good = tmp_path / "good.jsonl"
    good.write_bytes(GOOD)
    archive = tmp_path / "a.txt.bz2"
    archive.write_bytes(b"x")
    table = tmp_path / "a.parquet"
    table.write_bytes(b"x")
    cases: list[tuple[list[Path], list[str], str]] = [
        ([empty], [], "holds no documents"),
        ([tmp_path / "absent*.jsonl"], [], "there is no such file"),
        ([good, good], [], "twice"),
        ([archive], [], "compressed in a way"),
        ([table], [], "no readable Parquet"),
        ([good], ["--json-keys", "text", "text"], "names a key twice"),
        ([good], ["--shards", "2"], "fewer documents than --shards"),
    ]
    for number, (inputs, flags, message) in enumerate(cases):
        assert preprocess(tmp_path / f"o{number}", inputs, *flags) == 2
        assert message in capfd.readouterr().err
    assert main(["preprocess", "--input", str(good)]) == 2


def test_finished_and_foreign_work_is_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", records(7, 9))
    assert preprocess(tmp_path / "o", [source]) == 0
    before = files(tmp_path / "o")
    assert preprocess(tmp_path / "o", [source], "--append-eod") == 2
    assert "exists already" in capfd.readouterr().err
    for flag in ("--resume", "--shard=0/2"):
        assert preprocess(tmp_path / "o", [source], "--append-eod", flag) == 2
        assert "made by another run" in capfd.readouterr().err
    assert preprocess(tmp_path / "o", [source]) == 0
    assert "nothing to do" in capfd.readouterr().err and files(tmp_path / "o") == before


MEASURED = """
import resource, sys
from megatron_retro.cli.main import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


def test_a_line_beyond_the_limit_is_named_and_never_held(tmp_path: Path) -> None:
    def peak(path: Path, *flags: str) -> tuple[int, str]:
        words = ["preprocess", "--input", str(path), "--output-prefix", str(path) + ".o", "--workers", "1", *flags]
        run = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return int(run.stdout), run.stderr

    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_bytes(GOOD)
    with large.open("wb") as stream:
        stream.write(GOOD)
        stream.truncate(300 << 20)
    usual, _ = peak(small)
    peak_mb, said = peak(large, "--on-error", "skip", "--max-document-bytes", "100000")
    assert peak_mb < usual + 40
    assert "1 records were refused" in said
    assert "more than --max-document-bytes 100000" in Path(f"{large}.o.refused.txt").read_text()
    assert large.stat().st_size - len(GOOD) == Path(f"{large}.o.refused.jsonl").stat().st_size


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_tokenizer_of_ones_own_covers_every_text(tmp_path: Path, algorithm: str) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", records(11, 300))
    flags = ["--tokenizer-output", str(tmp_path / "m"), "--tokenizer-vocab-size", "400"]
    assert main(["train-tokenizer", "--input", str(source), *flags, "--tokenizer-algorithm", algorithm]) == 0
    first = (tmp_path / "m.model").read_bytes()
    assert main(["train-tokenizer", "--input", str(source), *flags, "--tokenizer-algorithm", algorithm]) == 0
    assert (tmp_path / "m.model").read_bytes() == first
    other = [*flags[:-1], "390", "--tokenizer-algorithm", algorithm]  # corpora may be tokenized with the first one
    assert main(["train-tokenizer", "--input", str(source), *other]) == 2
    assert (tmp_path / "m.model").read_bytes() == first
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    for text in ("ordinary words\n\n  and 12,345", "\u2603 ∮ 𝔘 日本語\t\0"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len((tmp_path / "m.vocab").read_text().splitlines()) == 400


def test_a_tokenizer_needs_enough_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(GOOD)
    assert main(["train-tokenizer", "--input", str(source), "--tokenizer-output", str(tmp_path / "m")]) == 2
    assert "smaller --tokenizer-vocab-size" in capfd.readouterr().err and not (tmp_path / "m.model").exists()
