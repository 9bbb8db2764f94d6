"""Kill workers, flip bytes, fill the disk, mix up inputs: named, resumable, and the same table in the end."""

from __future__ import annotations

import errno
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.artifacts import claims
from megatron_retro.artifacts.manifest import write_manifest
from megatron_retro.cli.main import main
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ArtifactError, ConfigError, DataError, EnvironmentProblem, MegatronRetroError, Requeue
from megatron_retro.retrieval import faiss_index
from megatron_retro.retrieval.chunk_encoding import ChunkEncoder
from megatron_retro.retrieval.faiss_index import faiss_module, read_index, write_index
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.testing.corpora import write_documents
from megatron_retro.testing.retrieval_projects import CHUNK, echoing_documents, project_settings, write_corpus

pytestmark = pytest.mark.long

FLAGS = ["--retro-chunk-length", str(CHUNK), "--retro-embedder-dimension", "64", "--retro-block-size", "97"]
INDEX = ["--retro-index-str", "IVF8,Flat", "--retro-query-nprobe", "4", "--retro-query-num-neighbors-save", "5"]
TASKS = ["--retro-tasks", "train", "encode", "merge", "query"]


def flip_byte(path: Path, place: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("faults") / "corpus", echoing_documents(11, 150))


@pytest.fixture
def settings(corpus: str, tmp_path: Path) -> Settings:
    return project_settings(tmp_path / "project", [corpus], retro_block_size=200, retro_tasks=["train"])


def run_stages(settings: Settings, *stages: str) -> None:
    build_retrieval(settings.replace(retro_tasks=list(stages)))


def table_bytes(project: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((project / "neighbors" / "corpus").glob("*.ids"))]


def test_a_signal_is_heard_at_a_block_s_end(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block in work is kept, the code asks for a new start, and that goes on to the undisturbed bytes."""
    stages = ("train", "encode", "merge", "query")
    run_stages(settings.replace(retro_project_dir=str(tmp_path / "whole")), *stages)
    run_stages(settings, "train")
    write = ChunkEncoder.write_block

    def interrupted(self: ChunkEncoder, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(self, *arguments)

    monkeypatch.setattr(ChunkEncoder, "write_block", interrupted)
    with pytest.raises(Requeue, match="finished blocks are kept"):
        run_stages(settings, "encode")
    monkeypatch.setattr(ChunkEncoder, "write_block", write)
    codes = tmp_path / "project/index/codes"
    kept = {path.name: path.read_bytes() for path in codes.iterdir()}
    assert len(kept) == 1
    run_stages(settings, *stages)
    assert len(list(codes.iterdir())) > 1
    assert all((codes / name).read_bytes() == content for name, content in kept.items())
    assert table_bytes(tmp_path / "project") == table_bytes(tmp_path / "whole")


def test_a_build_whose_workers_are_killed_ends_as_the_undisturbed_one(
    corpus: str, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """Two workers at a time, one of them killed at a random moment, until enough were killed; then one finishes."""

    def command(project: Path) -> list[str]:
        words = ["build-retrieval", "--retro-project-dir", str(project), "--retro-database-corpus", corpus]
        return [sys.executable, "-m", "megatron_retro.cli.main", *words, *FLAGS, *INDEX, *TASKS]

    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    subprocess.run(command(calm), check=True, capture_output=True)
    dice = random.Random(0)
    start = time.monotonic()
    subprocess.run(command(tmp_path / "timed"), check=True, capture_output=True)
    typical = time.monotonic() - start
    for _ in range(count(3, 30)):
        if (stormy / "neighbors" / "corpus").exists():
            for part in dice.choice([["neighbors"], ["neighbors", "index"]]):
                shutil.rmtree(stormy / part)
        workers = [
            subprocess.Popen([*command(stormy), "--shard", f"{shard}/2"], stderr=subprocess.DEVNULL)
            for shard in range(2)
        ]
        time.sleep(dice.uniform(0.4, 1.0) * typical)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
    finish = subprocess.run(command(stormy), capture_output=True, text=True)
    assert finish.returncode == 0, finish.stderr
    assert table_bytes(stormy) == table_bytes(calm) and table_bytes(calm)
    for name in ("index.faiss", "lists.ivfdata"):
        left, right = (root / "index" / "merged" / name for root in (calm, stormy))
        assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("stage", ["merge", "query"])
def test_a_stage_that_was_stopped_before_it_cleaned_up_is_cleaned_by_the_next_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """An error on the way out of the last claim: what the stage made is there, and all that it worked with."""
    run_stages(settings, "train", "encode", *(["merge"] if stage == "query" else []))
    work = tmp_path / "project/work"
    before = sorted(path for path in work.rglob("*") if "claims" not in path.parts)
    content, ends = claims._content, []

    def fail(path: Path) -> str | None:
        if path.name == "finish.claim" and path.exists():
            ends.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return content(path)

    with monkeypatch.context() as patch:
        patch.setattr(claims, "_content", fail)
        with pytest.raises(OSError, match="No space"):
            run_stages(settings, stage)
    assert ends and first(tmp_path / "project", {"merge": "index/merged", "query": "neighbors/corpus"}[stage]).is_dir()
    run_stages(settings, stage)
    assert sorted(path for path in work.rglob("*") if "claims" not in path.parts) == before
    assert not list(work.glob("claims/neighbors-*"))


@pytest.mark.parametrize(
    ("stages", "damage", "message"),
    [
        (("train",), lambda root: flip_byte(root / "index/trained/trained.faiss"), "trained.faiss has changed"),
        (("train", "encode"), lambda root: flip_byte(first(root, "index/codes/*")), "checksum of"),
        (("train", "encode"), lambda root: flip_byte(first(root, "index/codes/*"), 20), "damaged|does not match"),
        (("train", "encode"), lambda root: flip_byte(first(root, "index/codes/*"), 71), "damaged|does not match"),
        (("train", "encode"), lambda root: cut(first(root, "index/codes/*")), "is damaged"),
        (("train", "encode"), lambda root: first(root, "index/codes/*").unlink(), "is missing"),
        (("train", "encode", "merge"), lambda root: cut(root / "index/merged/lists.ivfdata"), "is cut or replaced"),
    ],
)
def test_damage_is_named_by_the_next_stage(
    settings: Settings, tmp_path: Path, stages: tuple[str, ...], damage: Callable[[Path], None], message: str
) -> None:
    run_stages(settings, *stages)
    damage(tmp_path / "project")
    following = {"train": "encode", "encode": "merge", "merge": "query"}[stages[-1]]
    with pytest.raises(ArtifactError, match=message):
        run_stages(settings, following)


def first(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_a_damaged_block_is_made_again_alone(settings: Settings, tmp_path: Path) -> None:
    run_stages(settings, "train", "encode")
    blocks = sorted((tmp_path / "project/index/codes").glob("*"))
    whole, times = blocks[1].read_bytes(), [block.stat().st_mtime_ns for block in blocks]
    flip_byte(blocks[1])
    with pytest.raises(ArtifactError, match=blocks[1].name):
        run_stages(settings, "merge")
    blocks[1].unlink()
    run_stages(settings, "encode", "merge", "query")
    assert blocks[1].read_bytes() == whole
    changed = [now.stat().st_mtime_ns != before for now, before in zip(blocks, times, strict=True)]
    assert changed == [False, True, *[False] * (len(blocks) - 2)]


def test_an_index_of_another_user_is_read_by_a_child_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest fits it, so nothing but faiss can tell; what ends a process ends the child."""
    made = tmp_path / "made"
    made.mkdir()
    write_index(faiss_module().index_factory(8, "Flat"), made / "index.faiss")
    monkeypatch.setattr(os, "getuid", lambda: made.stat().st_uid + 1)
    manifest = write_manifest(made, kind="index", version=1)
    assert read_index(made, manifest, "index.faiss", fix="build it").ntotal == 0
    monkeypatch.setattr(faiss_index, "_CHILD", "import os; os.abort()  #")
    with pytest.raises(ArtifactError, match=r"made by another user.*\n.*exit status -6"):
        read_index(made, manifest, "index.faiss", fix="build it")


def test_damaged_kept_vectors_are_named(settings: Settings, tmp_path: Path) -> None:
    kept = settings.replace(retro_keep_embeddings=True)
    run_stages(kept, "train", "encode")
    flip_byte(tmp_path / "project/index/embeddings/vectors.bf16")
    with pytest.raises(ArtifactError, match="damaged at the vectors of the chunks"):
        run_stages(kept, "merge")


def test_verify_sees_a_flipped_byte_in_the_index_and_in_a_table(settings: Settings, tmp_path: Path) -> None:
    run_stages(settings, "train", "encode", "merge", "query")
    for file in ("index/merged/lists.ivfdata", "neighbors/corpus/*.ids"):
        path = first(tmp_path / "project", file)
        flip_byte(path)
        with pytest.raises(ArtifactError, match="changed since it was written"):
            run_stages(settings, "verify")
        flip_byte(path)
    run_stages(settings, "verify")


def test_a_full_disk_is_named_and_the_build_goes_on_afterwards(corpus: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the middle."""
    words = ["build-retrieval", "--retro-project-dir", str(tmp_path / "project"), "--retro-database-corpus", corpus]
    command = [sys.executable, "-m", "megatron_retro.cli.main", *words, *FLAGS, *INDEX, *TASKS]

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    failed = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True)
    assert failed.returncode == 2
    assert f"megatron-retro {shlex.join(command[3:])}" in failed.stderr, "the advice holds the whole command"
    assert not (tmp_path / "project" / "neighbors" / "corpus").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert table_bytes(tmp_path / "project")


def test_no_space_left_is_a_named_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stages(settings, "train", "encode")

    def full(descriptor: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        run_stages(settings, "merge")
    monkeypatch.undo()
    run_stages(settings, "merge", "query")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"retro_index_str": "IVF4096,Flat"}, ConfigError, "too few chunks to train IVF4096"),
        ({"retro_index_str": "IVF8,PQ8"}, ConfigError, "too few chunks to train"),
        ({"retro_index_str": "PCA128,IVF4,Flat"}, ConfigError, "faiss cannot train"),
        ({"retro_index_str": "nonsense"}, ConfigError, "faiss makes no index"),
        ({"retro_memory_gb": 0.1, "retro_index_ntrain": 10**6, "retro_index_str": "IVF4,Flat"}, None, ""),
        ({"retro_index_train_load_fraction": 0.0}, ConfigError, "no chunk is left to train"),
        ({"retro_embedder_dimension": 100}, ConfigError, "no multiple of 64"),
        ({"retro_embedder": "huggingface"}, ConfigError, "needs a model"),
        ({"retro_query_num_neighbors_query": 3}, ConfigError, "smaller than"),
        ({"retro_query_corpus": ["a/x", "b/x"]}, ConfigError, "one name"),
        ({"retro_database_corpus": ["nowhere"]}, MegatronRetroError, "nowhere"),
        ({"shard": "2/2"}, ConfigError, "no such worker"),
        ({"retro_database_documents": ["5:3"]}, ConfigError, "no range"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    settings: Settings, tmp_path: Path, changes: dict, kind: type[Exception] | None, message: str
) -> None:
    if kind is None:
        run_stages(settings.replace(**changes), "train")
        return
    with pytest.raises(kind, match=message):
        run_stages(settings.replace(**changes), "plan", "train", "encode", "merge", "query")
    assert not (tmp_path / "project/index/trained").exists()


def test_documents_that_have_no_end_are_not_asked_for_it(settings: Settings, tmp_path: Path) -> None:
    """All end with one id, as texts with a full stop do: it is no other tokenizer's end where the user knows."""
    prefix = tmp_path / "without"
    write_documents(prefix, ([number, 7, 46] * 8 for number in range(40)))
    there = settings.replace(retro_database_corpus=[str(prefix)])
    with pytest.raises(DataError, match="or say --no-retro-database-eod"):
        run_stages(there, "train")
    run_stages(there.replace(retro_database_eod=False), "train")


def test_rows_beyond_the_corpus_are_refused(settings: Settings) -> None:
    run_stages(settings, "train", "encode", "merge")
    with pytest.raises(ConfigError, match="rows that the corpus does not have"):
        run_stages(settings.replace(retro_query_rows=["0:999999"]), "query")


def test_other_settings_in_the_same_directory_are_refused(settings: Settings, corpus: str, tmp_path: Path) -> None:
    run_stages(settings, "train", "encode", "merge", "query")
    other = write_corpus(tmp_path / "other", echoing_documents(12, 20))
    for changes, message in (
        ({"retro_chunk_length": 8}, "chunk-length"),
        ({"retro_embedder_dimension": 128}, "embedder"),
        ({"retro_block_size": 100}, "block_size"),
        ({"retro_index_str": "IVF4,Flat"}, "index_str"),
        ({"retro_database_corpus": [other]}, "retro-database-corpus"),
        ({"retro_database_documents": ["0:100"]}, "retro-database-documents"),
        ({"retro_query_num_neighbors_save": 3}, "neighbors-save"),
        ({"retro_rerank": "overlap"}, "rerank"),
        ({"retro_query_corpus": [f"corpus={other}"]}, "corpus does not match"),
    ):
        with pytest.raises(ArtifactError, match=message):
            run_stages(settings.replace(**changes), "query")


def test_stages_out_of_order_say_what_is_missing(settings: Settings) -> None:
    for stage, maker in (("encode", "train"), ("merge", "train"), ("query", "merge"), ("verify", "merge")):
        with pytest.raises(ConfigError, match=f"{stage} needs what the stage {maker} makes"):
            run_stages(settings, stage)
    run_stages(settings, "train")
    with pytest.raises(ConfigError, match="query needs what the stage merge makes"):
        run_stages(settings, "encode", "query")


def test_an_encoder_without_weights_is_refused(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    changed = settings.replace(retro_embedder="huggingface", retro_embedder_path=str(folder))
    with pytest.raises(ArtifactError, match="is no encoder"):
        run_stages(changed, "train")


def test_the_command_line_exits_with_3_below_the_floor(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build-retrieval", "--retro-project-dir", str(tmp_path / "project"), "--retro-database-corpus", corpus]
    weak = ["--retro-index-str", "IVF8,Flat", "--retro-query-nprobe", "1", "--retro-recall-floor", "0.99"]
    assert main([*words, *FLAGS, *weak]) == 3
    assert "below the floor" in capsys.readouterr().err
    assert (tmp_path / "project/report/quality.html").exists()
