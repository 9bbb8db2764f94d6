"""Retrieval-augmented instruction data: conversations get the passages that an index has for them.

A trainer never searches, so the passages are written into the file. The query is what a chunk that ends with the
prompt holds: the last tokens, one chunk of them, of what the user said last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import new_file
from megatron_retro.config.data import ContextsConfig, TokenizerConfig
from megatron_retro.config.inference import LiveRetrievalConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.instructions.conversations import Conversation, read_records
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.live_index import LiveIndex
from megatron_retro.runtime.console import say
from megatron_retro.runtime.strict_json import json_text

_TOGETHER = 256


def retrieve_contexts(settings: Settings, paths: Sequence[str]) -> None:
    """Copy the file SOURCE to TARGET with the passages that an index has for its conversations."""
    if len(paths) != 2:
        raise ConfigError("retrieve-contexts takes two paths", got=" ".join(paths) or "none", expected="SOURCE TARGET")
    project = settings[LiveRetrievalConfig].retro_index
    if project is None:
        raise ConfigError("where are the passages?", expected="--retro-index DIR", fix="make one with build-retrieval")
    source, target = map(Path, paths)
    index = LiveIndex(project, allow_tokenizer_mismatch=settings[TokenizerConfig].allow_tokenizer_mismatch)
    read, searched = write_contexts(source, target, index, settings[ContextsConfig])
    say(f"{target}: {read} conversations, passages searched for {searched} of them")


def write_contexts(source: Path, target: Path, index: LiveIndex, config: ContextsConfig) -> tuple[int, int]:
    """Copy a file of conversations with passages filled in; how many were read, and how many were searched for."""
    records = read_records(source)
    searched = 0
    with new_file(target) as partial, partial.open("w", encoding="utf-8") as stream:
        for start in range(0, len(records), _TOGETHER):
            part = records[start : start + _TOGETHER]
            asked = [number for number, (_, one) in enumerate(part) if config.replace_contexts or not one.passages]
            found = _passages([part[number][1] for number in asked], index, config)
            for number, passages in zip(asked, found, strict=True):
                part[number][0]["contexts"] = [{"text": text} for text in passages]
            stream.writelines(json_text(_without_empty(record), ensure_ascii=False) + "\n" for record, _ in part)
            searched += len(asked)
    return len(records), searched


def _passages(conversations: Sequence[Conversation], index: LiveIndex, config: ContextsConfig) -> Iterator[list[str]]:
    if not conversations:
        return
    length = index.database.chunk_length
    queries = [index.tokenizer.encode(question_of(one))[-length:] for one in conversations]
    ids, _ = index.search(queries, config.retrieved_contexts)
    tokens, present = index.database.gather(ids, length * config.retrieved_context_chunks)
    for row, (found, there) in enumerate(zip(tokens, present, strict=True)):
        texts = [index.tokenizer.decode(one[mask].tolist()).strip() for one, mask in zip(found, there, strict=True)]
        yield [text for text, number in zip(texts, ids[row], strict=True) if number >= 0 and text]


def question_of(conversation: Conversation) -> str:
    """What the user said last; the whole of a conversation in which only others speak."""
    said = [turn.text for turn in conversation.turns[:-1] if turn.role == "user"]
    return said[-1] if said else " ".join(turn.text for turn in conversation.turns[:-1])


def _without_empty(record: dict[str, Any]) -> dict[str, Any]:
    """An index that has nothing leaves no empty list behind, which would be refused."""
    return record if record.get("contexts", True) else {key: record[key] for key in record if key != "contexts"}
