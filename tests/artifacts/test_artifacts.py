"""Artifacts are old or new, never half; one changed byte is noticed; any number of workers share blocks."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_retro.artifacts import files
from megatron_retro.artifacts.claims import BlockClaims
from megatron_retro.artifacts.files import new_directory, publish_directory, remove_leftovers
from megatron_retro.artifacts.manifest import damage, load_manifest, read_manifest, require_same, write_manifest
from megatron_retro.errors import ArtifactError, EnvironmentProblem

KIND = "test"


def write_artifact(path: Path, generation: int, size: int = 50_000) -> None:
    with new_directory(path, replace=True) as work:
        for name in ("a.bin", "b.bin"):
            (work / name).write_bytes(bytes([generation % 256]) * size)
        write_manifest(work, kind=KIND, version=1, counts={"generation": generation})


def run_until_killed(work: Callable[[], None], seconds: float) -> None:
    """Run in a forked process that is killed at a random moment."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def rewrite_forever(path: Path, start: int) -> None:
    for generation in range(start, start + 10_000):
        write_artifact(path, generation)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_kill_leaves_the_old_or_the_new(
    tmp_path: Path, exchange: bool, count: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    path = tmp_path / "artifact"
    began = time.monotonic()
    write_artifact(path, 0)
    longest = max(0.06, 3 * (time.monotonic() - began))  # some kills come after a write, also on a slow disk
    chance = random.Random(7)
    last = 0
    for _ in range(count(40, 200)):
        run_until_killed(partial(rewrite_forever, path, last + 1), chance.uniform(0.002, longest))
        manifest = read_manifest(path, kind=KIND, version=1)
        assert damage(path, manifest) == []
        assert manifest.counts["generation"] >= last
        last = manifest.counts["generation"]
        remove_leftovers(tmp_path)
    assert last > 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("renames", [1, 2])
@pytest.mark.parametrize("goes_on", ["writes", "cleans"])
def test_the_next_run_removes_the_old_directory(
    tmp_path: Path, renames: int, goes_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an exchange, a kill after either of the two renames leaves the old directory under another name."""
    path = tmp_path / "artifact"
    write_artifact(path, 1, size=10)
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    child = os.fork()
    if child == 0:
        renamed, done = os.rename, []

        def rename(source: Path, target: Path) -> None:
            if len(done) == renames + 1:  # the first fails: the name is taken
                os._exit(0)
            done.append(target)
            renamed(source, target)

        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: os._exit(0))
        write_artifact(path, 2, size=10)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert any(files.RETIRED_MARK in entry.name for entry in tmp_path.iterdir())
    if goes_on == "writes":
        write_artifact(path, 3, size=10)
    else:
        read_manifest(path, kind=KIND, version=1)
        remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    write_artifact(path, 1, size=300)
    for file in path.iterdir():
        good = file.read_bytes()
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 1 << place % 8
            file.write_bytes(bad)
            assert is_noticed(path), f"{file.name} byte {place}"
        file.write_bytes(good[:-1])
        assert is_noticed(path)
        file.write_bytes(good)
    assert not is_noticed(path)
    (path / "extra").write_text("x")
    assert is_noticed(path)


def is_noticed(path: Path) -> bool:
    try:
        return bool(damage(path, load_manifest(path)))
    except ArtifactError:
        return True


def test_refusals_name_what_and_both_values(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    write_artifact(path, 1, size=10)
    with pytest.raises(ArtifactError, match=r"got: +test\n +expected: other"):
        read_manifest(path, kind="other", version=1)
    with pytest.raises(ArtifactError, match="newer format"):
        read_manifest(path, kind=KIND, version=0)
    with pytest.raises(ArtifactError, match="no manifest"):
        read_manifest(tmp_path, kind=KIND, version=1)
    with pytest.raises(ArtifactError, match="corpus does not match"):
        require_same(path, "corpus", "a", "b", rebuild="build it")
    with pytest.raises(ArtifactError, match="exists already"), new_directory(path):
        pass


def test_fingerprint_covers_content_and_not_the_date(tmp_path: Path) -> None:
    for name, generation in (("a", 1), ("b", 1), ("c", 2)):
        write_artifact(tmp_path / name, generation, size=10)
    first, same, other = (load_manifest(tmp_path / name).fingerprint for name in "abc")
    assert first == same != other


def test_full_disk_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifact"
    write_artifact(path, 1)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(EnvironmentProblem, match="disk is full"):
        patch.setattr(files, "flush_file", full)
        write_artifact(path, 2)
    assert read_manifest(path, kind=KIND, version=1).counts["generation"] == 1
    assert os.listdir(tmp_path) == ["artifact"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_device_is_one_sentence() -> None:
    with pytest.raises(EnvironmentProblem, match="disk is full"), files.named_disk_errors(Path("/dev/full")):
        Path("/dev/full").write_bytes(b"x" * 100)


def test_publish_over_an_unfinished_directory(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    publish_directory(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["old"]


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    write_artifact(tmp_path / "artifact", 1, size=10)
    content = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert content["kind"] == KIND
    assert set(content["files"]) == {"a.bin", "b.bin"}


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="no directory here that root may not write")
def test_an_unwritable_directory_is_one_sentence() -> None:
    with pytest.raises(EnvironmentProblem, match="/sys/kernel/x cannot be written"):
        files.write_file(Path("/sys/kernel/x"), "content")


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    below = tmp_path / "file/deep/below"
    ways: tuple[Callable[[], object], ...] = (
        lambda: files.write_file(below, "x"),
        lambda: new_directory(below).__enter__(),
        lambda: list(BlockClaims(below, ["block"], lambda block: False)),
    )
    for write in ways:
        with pytest.raises(EnvironmentProblem, match=r"no folder can be made at .*file/deep") as refused:
            write()
        assert refused.value.exit_code == 2
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_another_process_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone when one looks what was in the way, and the folder above it when it was just made."""
    folder, make, calls = tmp_path / "claims/blocks", os.mkdir, list[Path]()
    folder.mkdir(parents=True)

    def make_and_lose(path: Path, *arguments: int) -> None:
        calls.append(path)
        try:
            make(path, *arguments)
        finally:
            if len(calls) in (1, 3):
                shutil.rmtree(folder.parent)

    monkeypatch.setattr(os, "mkdir", make_and_lose)
    files.make_folder(folder)
    assert folder.is_dir()
    assert calls == [folder, folder, folder.parent, folder, folder, folder.parent, folder]


def test_a_run_that_finds_no_room_for_a_checkpoint_does_not_begin(tmp_path: Path) -> None:
    files.require_room(tmp_path, 1)
    with pytest.raises(EnvironmentProblem, match="no room for one checkpoint"):
        files.require_room(tmp_path, 10**18)


def test_leftovers_of_another_host_are_not_judged_by_a_local_process(tmp_path: Path) -> None:
    ours, gone = files.temporary_name(tmp_path / "a"), 1 << 22
    dead = ours.with_name(ours.name.replace(f"-{os.getpid()}-", f"-{gone}-"))
    theirs = dead.with_name(dead.name.replace(files.this_host(), "0123456789ab"))
    old = theirs.with_name(theirs.name + "0")
    for path in (ours, dead, theirs, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    assert remove_leftovers(tmp_path) == 2
    assert ours.exists() and theirs.exists() and not dead.exists() and not old.exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_that_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with new_directory(tmp_path / "new") as work:
            for name, mode in (("closed", 0o600), ("open", 0o644)):
                (work / name).write_text("by a library")
                (work / name).chmod(mode)
            write_manifest(work, kind=KIND, version=1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o666 & ~mask}


def test_the_next_run_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    left = files.temporary_name(tmp_path / "new")
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{1 << 22}-"))
    left.mkdir()
    (left / "half").write_text("half")
    with new_directory(tmp_path / "new") as work:
        (work / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
