"""One tiny corpus for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_retro.testing.tiny_corpus import TinyCorpus, write_tiny_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    path: Path = tmp_path_factory.mktemp("corpus")
    return write_tiny_corpus(path / "tiny")
