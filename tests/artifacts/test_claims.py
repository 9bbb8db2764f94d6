"""Blocks are done once, by whoever lives; waiting for them costs a file system little."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import pytest

from megatron_retro.artifacts import claims as claims_module
from megatron_retro.artifacts import files
from megatron_retro.artifacts.claims import BlockClaims
from megatron_retro.errors import EnvironmentProblem
from tests.artifacts.test_artifacts import run_until_killed


def work_on_blocks(directory: Path, blocks: list[str], lease: float, pause: float) -> None:
    claims = BlockClaims(directory / "claims", blocks, lambda block: (directory / block).exists(), lease)
    for block in claims:
        time.sleep(pause)
        with (directory / "log").open("a") as log:
            log.write(f"{block}\n")
        files.write_file(directory / block, f"content of {block}")


def test_killed_workers_lose_their_blocks(tmp_path: Path) -> None:
    blocks = [f"block-{number}" for number in range(12)]
    for seconds in (0.05, 0.08, 0.11):
        run_until_killed(lambda: work_on_blocks(tmp_path, blocks, 5.0, 0.03), seconds)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            work_on_blocks(tmp_path, blocks, 5.0, 0.002)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert all((tmp_path / block).read_text() == f"content of {block}" for block in blocks)
    assert os.listdir(tmp_path / "claims") == []


def test_a_silent_worker_of_another_host_loses_its_lease(tmp_path: Path) -> None:
    claims = BlockClaims(tmp_path / "claims", ["only"], lambda block: (tmp_path / block).exists(), 0.4)
    claims.directory.mkdir()
    (claims.directory / "only.claim").write_text("elsewhere 1 token")
    start = time.monotonic()
    for block in claims:
        files.write_file(tmp_path / block, "done")
    assert time.monotonic() - start > 0.3
    assert (tmp_path / "only").exists()


def test_a_failure_of_the_file_server_ends_no_renewing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim is renewed when the server is back, not left to who takes its silent worker for dead."""
    renew, calls = os.utime, list[int]()

    def fail_once(path: Path) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        renew(path)

    monkeypatch.setattr(claims_module.os, "utime", fail_once)
    deadline = time.monotonic() + 20
    for _ in BlockClaims(tmp_path, ["a"], lambda _: len(calls) > 0, 0.1):
        before = (tmp_path / "a.claim").stat().st_mtime_ns
        while (tmp_path / "a.claim").stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "a.claim").stat().st_mtime_ns > before


def test_a_directory_may_go_when_all_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker of the last block removes it while others wait."""
    done, claims = list[str](), tmp_path / "claims"
    claims.mkdir()
    (claims / "a.claim").write_text("elsewhere 1 token")

    def finish(seconds: float) -> None:
        done.append("a")
        shutil.rmtree(claims)

    monkeypatch.setattr(claims_module.time, "sleep", finish)
    assert list(BlockClaims(claims, ["a"], done.__contains__)) == []


@pytest.mark.parametrize("done_by_others", [True, False])
def test_a_directory_may_go_while_a_block_is_claimed(tmp_path: Path, done_by_others: bool) -> None:
    """Between a look at the block and the claim; removed by whoever did the last block, or while there is work left."""
    claims, looks = tmp_path / "claims", list[bool]()

    def is_done(_: str) -> bool:
        looks.append(done_by_others and len(looks) > 0)
        if len(looks) == 1:
            shutil.rmtree(claims)
        return looks[-1]

    assert list(BlockClaims(claims, ["a"], is_done)) == ([] if done_by_others else ["a"])


def test_no_clock_but_the_file_system_s_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose clock is ahead takes no block from a living worker, one that is behind keeps none of a dead one."""
    clock = time.time
    for number, skew in enumerate((3600.0, -3600.0)):
        monkeypatch.setattr(time, "time", lambda skew=skew: clock() + skew)
        block = f"block-{number}"
        claim = tmp_path / f"{block}.claim"
        claim.write_text("elsewhere 1 token")
        claims = BlockClaims(tmp_path, [block], lambda block: (tmp_path / block).exists(), wait=False)
        assert list(claims) == [] and claim.exists()
        os.utime(claim, (clock() - 61, clock() - 61))
        assert list(claims) == [block]
    assert list(tmp_path.iterdir()) == []


def test_a_claim_on_a_full_disk_is_a_named_error_and_holds_nothing(tmp_path: Path) -> None:
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=8k tmpfs {tmp_path} 2>/dev/null") != 0:
        pytest.skip("this process may not mount a file system")
    try:
        claims = BlockClaims(tmp_path / "claims", ["only"], lambda block: False)
        claims.directory.mkdir()
        with suppress(OSError):
            (tmp_path / "ballast").write_bytes(bytes(100_000))
        with pytest.raises(EnvironmentProblem, match="the disk is full"):
            next(iter(claims))
        assert list(claims.directory.iterdir()) == []
        (tmp_path / "ballast").unlink()
        assert next(iter(claims)) == "only"
    finally:
        os.system(f"umount {tmp_path}")


def test_a_claim_of_another_host_ends_with_its_lease_alone(tmp_path: Path) -> None:
    """Its process number means nothing here, however alike the hosts are named."""
    claim = tmp_path / "a.claim"
    claim.write_text(f"0123456789ab {1 << 22} token")
    claims = BlockClaims(tmp_path, ["a"], lambda _: False, wait=False)
    assert list(claims) == []
    claim.write_text(f"{files.this_host()} {1 << 22} token")
    assert next(iter(claims)) == "a"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Calls of this thread into the system, by name; a file that is opened counts all that Python asks about it."""
    calls: Counter[str] = Counter()
    weights = {"open": 4, "listdir": 5, "scandir": 5}

    def note(frame: FrameType, event: str, function: object) -> None:
        module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
        if event == "c_call" and module in ("posix", "_io") and name not in ("getpid", "fspath", "fsdecode", "urandom"):
            calls[name] += weights.get(name, 1)

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


WAITERS = 500


def test_five_hundred_waiting_workers_ask_a_file_system_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 blocks 500 are held. What one of the waiters asks, counted, times 500: at most 100 calls a second."""
    blocks = [f"{number:06d}" for number in range(20_000)]
    held, asked, slept, looks = blocks[:: 20_000 // WAITERS], Counter[str](), list[float](), list[tuple[int, float]]()
    working = set(held)
    for block in held:
        (tmp_path / f"{block}.claim").write_text("elsewhere 1 token")
    for number in range(WAITERS - 1):
        (tmp_path / f"waiter.partial-elsewhere-{number}").touch()

    def is_done(block: str) -> bool:
        asked[block] += 1
        return block not in working

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        looks.append((calls.total(), sum(slept)))
        if sum(slept) > 2 * 3600:
            working.clear()
            for claim in tmp_path.glob("*.claim"):
                claim.unlink()

    monkeypatch.setattr(claims_module.time, "sleep", sleep)
    clock = time.monotonic
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: clock() + sum(slept))
    with counted() as calls:
        assert list(BlockClaims(tmp_path, blocks, is_done)) == []
    assert all(asked[block] == 1 for block in blocks if block not in held), "a finished block is looked at once"
    assert max(asked.values()) == 2
    (first, begin), (last, end) = next(look for look in looks if look[1] > 1800), looks[-1]
    assert 10 < WAITERS * (last - first) / (end - begin) < 100
    assert max(slept) < 2 * 60
