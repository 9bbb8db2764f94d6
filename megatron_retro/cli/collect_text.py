"""`megatron-retro collect-text`: a corpus from the text that every machine has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_retro.artifacts.files import new_file
from megatron_retro.config.collect import CollectConfig
from megatron_retro.config.command_line import Positional
from megatron_retro.config.settings import Settings
from megatron_retro.data.standard_library import standard_library_documents
from megatron_retro.errors import ConfigError
from megatron_retro.runtime.console import readable_bytes, say

DESCRIPTION = "Write the sources and reference of Python's standard library as JSON lines, whole files held out."
SECTIONS: tuple[type, ...] = (CollectConfig,)
POSITIONAL: Positional | None = None


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Write `train.jsonl` and `held_out.jsonl`."""
    config = settings[CollectConfig]
    if config.collect_output is None:
        raise ConfigError("--collect-output is missing", expected="a folder for the two files")
    folder = Path(config.collect_output)
    documents = list(standard_library_documents())
    for name, held_out in (("train", False), ("held_out", True)):
        chosen = [document for document in documents if document.is_held_out(config.collect_held_out) == held_out]
        path = folder / f"{name}.jsonl"
        with new_file(path) as partial, partial.open("w", encoding="utf-8") as stream:
            for document in chosen:
                stream.write(json.dumps({"id": document.name, "text": document.text}) + "\n")
        say(f"{path}: {len(chosen)} documents, {readable_bytes(path.stat().st_size)}")
