"""Token files, databases and tables behind URLs read as those on a disk do, through a cache that has a bound."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.artifacts import object_store, stored_artifact
from megatron_retro.artifacts.block_checksums import ChecksumList, RunningBlocks
from megatron_retro.artifacts.manifest import file_record, load_manifest, manifest_path, write_manifest
from megatron_retro.artifacts.object_cache import CacheFolder, use_cache
from megatron_retro.cli.main import main
from megatron_retro.config.data import DataConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.toml_files import render_toml
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.inspection import inspect
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.token_file import TokenFile, bin_path, checksums_path
from megatron_retro.data.token_writer import describe_token_file, merge_token_files
from megatron_retro.errors import ArtifactError, ConfigError, DamagedArtifact, DataError, EnvironmentProblem
from megatron_retro.testing.sample_corpora import EOD, LENGTH, corpus, retro_config, same
from megatron_retro.testing.tiny_corpus import losses, write_tiny_corpus
from megatron_retro.training.program import pretrain

pytest.importorskip("aiohttp")
BLOCK = 1 << 9


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, in ranges, each with what tells its versions apart; counts what it sends."""

    sent = 0
    fails = 0

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = Path(self.translate_path(self.path))
        if type(self).fails > 0:
            type(self).fails -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            type(self).sent += len(part)
            self.wfile.write(part)

    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of the test's folder `store`, and a cache."""
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(object_store, "_PAUSES", (0.01, 0.01))
    monkeypatch.setenv("MEGATRON_RETRO_OBJECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEGATRON_RETRO_OBJECT_CACHE_GB", "1")
    monkeypatch.setattr(RangeServer, "fails", 0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeServer, directory=str(tmp_path / "store")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def in_small_blocks(prefix: Path) -> None:
    """Describe a token file by checksums of blocks that are small enough to have many."""
    describe_token_file(prefix)
    running = RunningBlocks(BLOCK)
    running.feed(memoryview(bin_path(prefix).read_bytes()))
    checksums_path(prefix).write_bytes(ChecksumList.of(running, BLOCK).to_bytes())
    manifest = load_manifest(prefix)
    files = {**manifest.files, checksums_path(prefix).name: file_record(checksums_path(prefix))}
    write_manifest(prefix, kind=manifest.kind, version=manifest.version, counts=manifest.counts, files=files)


@pytest.fixture
def described(tmp_path: Path, served: str) -> TokenFile:
    """A token file on the disk, served as `/corpus`."""
    file = corpus(tmp_path / "store/corpus")
    in_small_blocks(tmp_path / "store/corpus")
    return file


def blocks_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.block"))


def test_tokens_are_those_of_the_disk(served: str, described: TokenFile, tmp_path: Path) -> None:
    far, near = TokenFile(f"{served}/corpus"), described
    assert far.fingerprint == near.fingerprint and far.num_tokens == near.num_tokens and far.dtype == near.dtype
    places = np.random.default_rng(0).integers(0, near.num_tokens, (3, 40))
    assert (far.at(places) == near.at(places)).all()
    for length in (1, 33, 3 * BLOCK):
        assert (far.rows(places[0], length) == near.rows(places[0], length)).all()
    assert np.concatenate(list(far.spans(100))).tolist() == near.stream.tolist()
    assert far.tokens(5, 5).size == 0 and (far.documents_of(places) == near.documents_of(places)).all()
    assert 0 < far.traffic.had < far.traffic.asked
    again = TokenFile(f"{served}/corpus")
    before = RangeServer.sent
    assert (again.tokens(0, again.num_tokens) == near.stream).all() and RangeServer.sent == before
    assert again.traffic.fetched_bytes == 0 and again.fingerprint == near.fingerprint
    merge_token_files([f"{served}/corpus"], tmp_path / "merged")
    assert bin_path(tmp_path / "merged").read_bytes() == bin_path(near.prefix).read_bytes()


def test_there_is_no_array_to_read_past_the_gate(served: str, described: TokenFile) -> None:
    far = TokenFile(f"{served}/corpus")
    with pytest.raises(DataError, match="is not mapped"):
        _ = far.stream
    database = ChunkDatabase.create(Path(described.prefix).parent.parent / "db", [far.prefix], LENGTH, eod=EOD)
    if database.native is not None:
        with pytest.raises(ValueError, match="not mapped"):
            database.native.gather(np.zeros(1, np.int64), LENGTH, 2, 1)


def over(settings: Settings, disk: Path, url: str) -> Settings:
    """The same run, its files read from elsewhere."""
    data = settings[DataConfig]

    def moved(paths: tuple[str, ...] | None) -> tuple[str, ...]:
        return tuple(path.replace(str(disk), url) for path in paths or ())

    return settings.replace(
        data_path=moved(data.data_path),
        neighbor_path=moved(data.neighbor_path),
        database_path=f"{url}/db",
    )


@pytest.mark.parametrize("kept", [True, False], ids=["described", "of another program"])
def test_samples_with_neighbours_are_those_of_the_disk(served: str, tmp_path: Path, kept: bool) -> None:
    file = corpus(tmp_path / "store/corpus")
    if kept:
        in_small_blocks(tmp_path / "store/corpus")
    near = retro_config(tmp_path / "store", file)
    far = over(near, tmp_path / "store", served)
    ours, theirs = (build_dataset(settings, "train", eod=EOD) for settings in (near, far))
    assert theirs.fingerprint == ours.fingerprint and theirs.num_samples == ours.num_samples
    for first in range(0, ours.num_samples, 8):
        numbers = range(first, min(first + 8, ours.num_samples))
        assert same(ours.read(numbers), theirs.read(numbers))
    assert theirs.traffic.fetched_bytes > 0 and not ours.traffic.asked


def test_the_cache_stays_within_its_bound(served: str, described: TokenFile, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    TokenFile(f"{served}/corpus")
    kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.name != "used")
    bound = kept + 6 * BLOCK
    use_cache(str(cache), bound / 1e9)
    far = TokenFile(f"{served}/corpus")
    for number in np.random.default_rng(0).permutation(far.num_tokens - 40)[:60].tolist():
        assert (far.tokens(number, number + 40) == described.tokens(number, number + 40)).all()
        sizes = [path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.name != "used"]
        assert sum(sizes) <= bound and len(blocks_in(cache)) >= 1
    use_cache(str(cache), (kept + 10) / 1e9)
    for block in blocks_in(cache):
        block.unlink()
    with pytest.raises(EnvironmentProblem, match="too small"):
        TokenFile(f"{served}/corpus").tokens(0, 10)


def test_the_blocks_used_longest_ago_make_room(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 1000)
    for number in range(4):
        with folder.room(200):
            (tmp_path / f"{number}.block").write_bytes(bytes(200))
        os.utime(tmp_path / f"{number}.block", (number, number))
    os.utime(tmp_path / "0.block")
    with folder.room(300):
        assert [path.name for path in blocks_in(tmp_path)] == ["0.block", "2.block", "3.block"]


def test_a_changed_block_is_refused_by_name(served: str, described: TokenFile) -> None:
    path = bin_path(described.prefix)
    content = bytearray(path.read_bytes())
    content[2 * BLOCK + 7] ^= 1
    far = TokenFile(f"{served}/corpus")
    path.write_bytes(content[: 4 * BLOCK + 100])
    with pytest.raises(DamagedArtifact, match=r"corpus\.bin is cut"):
        far.tokens(far.num_tokens - 5, far.num_tokens)
    path.write_bytes(content)
    assert far.tokens(0, BLOCK // 2).size
    with pytest.raises(
        DamagedArtifact, match=rf"corpus.bin has changed since .*(?s:.)*bytes {2 * BLOCK} to {3 * BLOCK}"
    ):
        far.tokens(0, far.num_tokens)


def test_a_block_that_a_crash_left_behind_is_fetched_again(served: str, described: TokenFile, tmp_path: Path) -> None:
    wanted = described.stream.tolist()
    assert TokenFile(f"{served}/corpus").tokens(0, described.num_tokens).tolist() == wanted
    first, second, *_ = blocks_in(tmp_path / "cache")
    first.write_bytes(bytes(first.stat().st_size))
    second.write_bytes(second.read_bytes()[:-9])
    far = TokenFile(f"{served}/corpus")
    assert far.tokens(0, described.num_tokens).tolist() == wanted
    assert far.traffic.fetched_bytes == 2 * BLOCK


@pytest.mark.parametrize("kept", [True, False], ids=["described", "of another program"])
def test_a_newer_object_empties_the_cache(served: str, tmp_path: Path, kept: bool) -> None:
    prefix = tmp_path / "store/corpus"
    opened = []
    for seed in (0, 1):
        manifest_path(prefix).unlink(missing_ok=True)
        near = corpus(prefix, seed)
        if kept:
            in_small_blocks(prefix)
        opened.append(TokenFile(f"{served}/corpus"))
        assert opened[-1].tokens(0, near.num_tokens).tolist() == near.stream.tolist()
        assert len({path.parent for path in blocks_in(tmp_path / "cache")}) == 1
    with pytest.raises(DamagedArtifact, match=r"changed since|replaced|cut"):
        opened[0].tokens(0, opened[0].num_tokens)


READER = """
import sys, numpy as np
from megatron_retro.data.token_file import TokenFile
file = TokenFile(sys.argv[1])
starts = np.random.default_rng(int(sys.argv[2])).integers(0, file.num_tokens - 40, 200)
print(int(file.rows(starts, 40).astype(np.int64).sum()))
"""


def test_processes_share_a_cache(served: str, described: TokenFile, tmp_path: Path) -> None:
    use_cache(str(tmp_path / "cache"), 6e-6)
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, f"{served}/corpus", str(seed)], stdout=subprocess.PIPE)
        for seed in (1, 2)
    ]
    for seed, reader in enumerate(readers, 1):
        starts = np.random.default_rng(seed).integers(0, described.num_tokens - 40, 200)
        assert int(reader.communicate(timeout=120)[0]) == described.rows(starts, 40).astype(np.int64).sum()
    sizes = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "used"]
    assert sum(sizes) <= 6000 and not list((tmp_path / "cache").rglob("*.partial-*"))


def test_a_server_that_fails_for_a_moment_is_asked_again(
    served: str, described: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = TokenFile(f"{served}/corpus")
    monkeypatch.setattr(RangeServer, "fails", 2)
    assert (far.tokens(0, 20) == described.tokens(0, 20)).all() and RangeServer.fails == 0


def test_a_lost_server_is_named(served: str, described: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    far = TokenFile(f"{served}/corpus")
    monkeypatch.setattr(RangeServer, "fails", 99)
    with pytest.raises(EnvironmentProblem, match=r"corpus.bin cannot be read: its server fails(?s:.)*503") as lost:
        far.tokens(0, 20)
    assert lost.value.exit_code == 2


def test_what_is_not_there_and_what_is_not_set_up_is_named(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"there is no object .*nothing\.idx"):
        TokenFile(f"{served}/nothing")
    with pytest.raises(ArtifactError, match="no manifest"):
        NeighborTable.open(f"{served}/table")
    with pytest.raises(EnvironmentProblem, match=r"object-stores"):
        TokenFile("unheard-of://bucket/corpus")
    with pytest.raises(EnvironmentProblem, match="only read"):
        describe_token_file(f"{served}/corpus")
    with pytest.raises(ArtifactError, match="reads all of a file"):
        inspect([f"{served}/corpus"])
    monkeypatch.delenv("MEGATRON_RETRO_OBJECT_CACHE")
    with pytest.raises(ConfigError, match="--object-storage-cache-path"):
        TokenFile(f"{served}/corpus")


def test_a_block_in_use_stays_young(
    served: str, described: TokenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_artifact, "_TOUCH_SECONDS", 0.0)
    far = TokenFile(f"{served}/corpus")
    far.tokens(0, 2)
    block = blocks_in(tmp_path / "cache")[0]
    os.utime(block, (1, 1))
    far.tokens(0, 2)
    assert time.time() - block.stat().st_mtime < 60


def test_any_store_of_fsspec_will_do(described: TokenFile) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in (bin_path(described.prefix), Path(f"{described.prefix}.idx")):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    far = TokenFile("memory://bucket/corpus")
    assert (
        far.tokens(0, far.num_tokens).tolist() == described.stream.tolist() and far.fingerprint == described.fingerprint
    )


def test_a_run_has_the_losses_of_the_disk(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    near = write_tiny_corpus(tmp_path / "store")
    found = []
    for name, place in (("disk", tmp_path / "store"), ("store", served)):
        paths = {"data_path": [f"{place}/tokens"], "neighbor_path": [f"{place}/neighbors"]}
        run = tmp_path / name
        pretrain(near.settings(**paths, database_path=f"{place}/database", save=str(run), train_iters=3, eval_iters=0))
        found.append(losses(run))
    assert found[0] == found[1] and len(found[0]) == 3
    assert "object stores: fetched" in capsys.readouterr().err
    monkeypatch.setattr(RangeServer, "fails", 10**6)
    recipe = tmp_path / "recipe.toml"
    again = near.settings(data_path=[f"{served}/tokens"], retro=False, save=str(tmp_path / "lost"))
    recipe.write_text(render_toml(again))
    assert main(["pretrain", "--config", str(recipe)]) == 2
    assert "its server fails" in capsys.readouterr().err
