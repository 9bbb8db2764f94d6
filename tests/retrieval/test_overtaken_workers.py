"""A worker that was taken for dead finds that another has done its work: what it fails at then is no error."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from megatron_retro.artifacts.files import named_disk_errors
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.retrieval import index_building
from megatron_retro.retrieval.layout import ProjectLayout
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.retrieval.work_blocks import ignore_failure_if_done
from megatron_retro.testing.retrieval_projects import echoing_documents, project_settings, write_corpus


@pytest.mark.parametrize("is_done", [True, False])
def test_a_write_that_the_file_server_refuses_is_ignored_where_another_has_done_it(
    tmp_path: Path, is_done: bool
) -> None:
    """An overtaken worker's file was removed: NFS calls its handle stale."""

    def write() -> None:
        with ignore_failure_if_done(lambda: is_done), named_disk_errors(tmp_path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(tmp_path))

    if is_done:
        write()
    else:
        with pytest.raises(EnvironmentProblem, match="lost a file"):
            write()


def test_a_mark_is_not_missed_by_who_is_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is published, and what the workers had beside it is gone, while one marks the block it has checked."""
    corpus = write_corpus(tmp_path / "corpus", echoing_documents(11, 150))
    settings = project_settings(tmp_path / "project", [corpus], retro_tasks=["train", "encode"])
    build_retrieval(settings)
    merging, claims = settings.replace(retro_tasks=["merge"]), ProjectLayout(tmp_path / "project").claims("")
    write, marked = index_building.write_file, list[Path]()

    def late(path: Path, content: bytes | str) -> None:
        if path.parent.name.startswith("checked-") and not marked:
            marked.append(path)
            shutil.rmtree(claims)
            build_retrieval(merging)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        write(path, content)

    monkeypatch.setattr(index_building, "write_file", late)
    build_retrieval(merging)
    assert marked
