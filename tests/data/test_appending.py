"""Blocks are appended to the output while others are made; killed at any step, the bytes are the same."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.artifacts import files as files_module
from megatron_retro.artifacts.manifest import damage, load_manifest
from megatron_retro.data.preprocessing import appending, run
from megatron_retro.data.preprocessing.blocks import BlockTokenizer
from megatron_retro.data.token_writer import TokenFileWriter
from megatron_retro.testing.corpora import write_json_lines
from megatron_retro.testing.preprocessing_runs import files, preprocess, records

pytestmark = pytest.mark.usefixtures("small_blocks")
KEYS = ("--json-keys", "text", "id_text", "--append-eod")
_STEPS = ("fsync", "replace", "unlink")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found = [{**record, "id_text": str(record["id"]) * 9} for record in records(4, 80)]
    return write_json_lines(tmp_path / "a.jsonl", found)


def both(prefix: Path) -> list[tuple[bytes, bytes]]:
    return [files(prefix, key) for key in ("text", "id_text")]


def run_until_step(last: int, words: list[Any]) -> bool:
    """Run in a process of its own that dies before its n-th change of a file; whether it came to that step."""
    process = os.fork()
    if process == 0:
        taken = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **more: Any) -> Any:
                nonlocal taken
                taken += 1
                if taken == last:
                    os._exit(9)
                return call(*arguments, **more)

            return step

        for name in _STEPS:
            setattr(os, name, counted(getattr(os, name)))
        os._exit(preprocess(words[0], words[1], *KEYS))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def test_killed_before_any_step_the_bytes_are_the_same(
    tmp_path: Path, source: Path, count: Callable[[int, int], int]
) -> None:
    assert preprocess(tmp_path / "whole", [source], *KEYS) == 0
    wanted, stride = both(tmp_path / "whole"), count(41, 1)
    step = 3
    while run_until_step(step, [tmp_path / str(step), [source]]):
        assert preprocess(tmp_path / str(step), [source], *KEYS, "--verify") == 0
        assert both(tmp_path / str(step)) == wanted, step
        assert not list(tmp_path.glob(f"{step}.unfinished"))
        step += stride
    assert step > 100


def test_no_more_parts_wait_than_are_appended_at_a_time(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, waiting = BlockTokenizer.tokenize, []

    def watched(self: BlockTokenizer, block: int, report: Any) -> None:
        waiting.append(len(list(self.directory.glob("*.tokens"))))
        make(self, block, report)

    monkeypatch.setattr(BlockTokenizer, "tokenize", watched)
    assert preprocess(tmp_path / "o", [source], *KEYS) == 0
    assert len(waiting) > 5 and max(waiting) <= 2 * 2  # two keys, two blocks of 2000 bytes at a time


def test_who_was_taken_for_dead_does_no_harm(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another appends, and goes on, between the tokens of the first one and its record."""
    assert preprocess(tmp_path / "whole", [source], *KEYS) == 0
    seal, sealed = appending.write_sealed_json, list[str]()
    append = appending.append_finished

    def late(path: Path, content: Any) -> None:
        sealed.append(path.name)
        if path.parent.name == "joined" and len(sealed) == 1:
            assert append(*last_call).blocks > 0
        seal(path, content)

    last_call: list[Any] = []

    def noted(*arguments: Any) -> Any:
        last_call[:] = arguments
        return append(*arguments)

    monkeypatch.setattr(appending, "write_sealed_json", late)
    monkeypatch.setattr("megatron_retro.data.preprocessing.joining.append_finished", noted)
    assert preprocess(tmp_path / "o", [source], *KEYS) == 0
    assert sealed[:2] == ["000002.json", "000002.json"]
    assert both(tmp_path / "o") == both(tmp_path / "whole")


@pytest.mark.parametrize("flags", [(), ("--shards", "2"), ("--shuffle-documents", "1")])
def test_who_is_overtaken_at_the_end_leaves_the_finished_files(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """Another takes the claim while the first one writes its index, finishes, and removes the work directory."""
    source.write_text(source.read_text() + "no record\n")
    write_index, overtaken = TokenFileWriter._written_index, list[int]()

    def late(self: TokenFileWriter) -> Any:
        index = write_index(self)
        if not overtaken:
            overtaken.append(1)
            shutil.rmtree(tmp_path / "o.unfinished/claims")
            assert preprocess(tmp_path / "o", [source], *KEYS, *flags, "--on-error", "skip") == 0
        return index

    def made(prefix: str) -> dict[str, bytes]:
        found = {path.name[1:]: path.read_bytes() for path in tmp_path.glob(f"{prefix}[._]*")}
        return {name: content for name, content in found.items() if not name.endswith("manifest.json")}

    assert preprocess(tmp_path / "w", [source], *KEYS, *flags, "--on-error", "skip") == 0
    monkeypatch.setattr(TokenFileWriter, "_written_index", late)
    assert preprocess(tmp_path / "o", [source], *KEYS, *flags, "--on-error", "skip") == 0
    assert overtaken and made("o") == made("w") and b"no record" in made("o")[".refused.jsonl"]
    for index in tmp_path.glob("o_*.idx"):
        prefix = index.with_suffix("")
        assert damage(prefix, load_manifest(prefix)) == []


def stopped_at(block: int, prefix: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work directory of a run that was stopped at a block."""
    make = BlockTokenizer.tokenize

    def stopping(self: BlockTokenizer, number: int, report: Any) -> None:
        if number == block:
            raise KeyboardInterrupt
        make(self, number, report)

    with monkeypatch.context() as patch:
        patch.setattr(BlockTokenizer, "tokenize", stopping)
        assert preprocess(prefix, [source], *KEYS) != 0
    return Path(f"{prefix}.unfinished")


def test_a_worker_may_start_while_the_last_one_ends(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The work directory goes after it was seen, because all is finished; or before the job is in it."""
    assert preprocess(tmp_path / "whole", [source], *KEYS) == 0
    stopped_at(5, tmp_path / "o", source, monkeypatch)
    look, flush = run._holds_work, files_module.flush_file

    def late(directory: Path) -> bool:
        monkeypatch.setattr(run, "_holds_work", look)
        assert look(directory) and preprocess(tmp_path / "o", [source], *KEYS) == 0
        return True

    def removed(path: Path) -> None:
        monkeypatch.setattr(files_module, "flush_file", flush)
        shutil.rmtree(tmp_path / "p.unfinished")
        flush(path)

    monkeypatch.setattr(run, "_holds_work", late)
    assert preprocess(tmp_path / "o", [source], *KEYS) == 0
    assert "finished before" in capfd.readouterr().err
    monkeypatch.setattr(files_module, "flush_file", removed)
    assert preprocess(tmp_path / "p", [source], *KEYS) == 0
    assert both(tmp_path / "o") == both(tmp_path / "p") == both(tmp_path / "whole")
    assert not list(tmp_path.glob("*.unfinished"))


def test_damage_to_the_unfinished_output_is_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for kind in ("bin", "lengths", "bounds"):
        folder = stopped_at(5, tmp_path / kind, source, monkeypatch)
        path = folder / f"{kind}_text_document.{kind}"
        content = bytearray(path.read_bytes())
        content[40] ^= 1
        path.write_bytes(content)
        assert preprocess(tmp_path / kind, [source], *KEYS, "--verify") == 2
        assert "changed since it was written" in capfd.readouterr().err


def test_other_shards_may_follow(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run of one file appended, a run of two shards makes again."""
    stopped_at(5, tmp_path / "o", source, monkeypatch)
    for prefix in ("o", "p"):
        assert preprocess(tmp_path / prefix, [source], *KEYS, "--shards", "2") == 0
    for shard in ("_00000-of-00002", "_00001-of-00002"):
        assert both(Path(f"{tmp_path / 'o'}{shard}")) == both(Path(f"{tmp_path / 'p'}{shard}"))


def test_the_output_does_not_wait_for_a_dead_worker_to_the_end(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that died holds block 0 until its lease ends; then it is the next one to be made."""
    claim = tmp_path / "o.unfinished/claims/000000.claim"
    claim.parent.mkdir(parents=True)
    claim.write_text("another-machine 1 token")
    make, made = BlockTokenizer.tokenize, list[int]()

    def watched(self: BlockTokenizer, block: int, report: Any) -> None:
        if block == 6:
            os.utime(claim, (time.time() - 99,) * 2)
        made.append(block)
        make(self, block, report)

    monkeypatch.setattr(BlockTokenizer, "tokenize", watched)
    assert preprocess(tmp_path / "o", [source], *KEYS) == 0
    assert sorted(made) == list(range(len(made))) and made.index(0) < len(made) - 2 and made[0] == 1
