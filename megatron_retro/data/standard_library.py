"""Text that every machine has: the sources and the language reference of Python's own standard library.

It repeats itself as program text does (codecs, headers, families of modules), which is what retrieval feeds on, and it
is here without a download. One document per file; whole files are held out, chosen by a hash of their name.

Questions with their answers are made from its docstrings. The answer is the first sentence of a function's or class's
docstring; the passage is the beginning of its source, which holds that sentence among other text, as a retrieved
passage does.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import new_file
from megatron_retro.config.data import CollectConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ConfigError
from megatron_retro.runtime.console import readable_bytes, say
from megatron_retro.runtime.strict_json import json_text

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
)
_ANSWER_LENGTHS = range(20, 141)
_PASSAGE_CHARACTERS = 300
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Document:
    """A name and its text."""

    name: str
    text: str

    def is_held_out(self, share: float) -> bool:
        """Whether this document is among the held-out `share`."""
        number = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        return number < share * 2**64


def collect_text(settings: Settings) -> None:
    """Write text and questions of the files to train on, and of those held out."""
    config = settings[CollectConfig]
    if config.collect_output is None:
        raise ConfigError("--collect-output is missing", expected="a folder for the files")
    folder = Path(config.collect_output)
    documents = list(standard_library_documents())
    for name, held_out in (("train", False), ("held_out", True)):
        chosen = [document for document in documents if document.is_held_out(config.collect_held_out) == held_out]
        _write(folder / f"{name}.jsonl", ({"id": one.name, "text": one.text} for one in chosen), "documents")
        questions = (question for document in chosen for question in library_questions(document))
        _write(folder / f"{name}_questions.jsonl", questions, "questions")


def _write(path: Path, records: Iterable[Mapping[str, Any]], what: str) -> None:
    count = 0
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json_text(record) + "\n")
            count += 1
    say(f"{path}: {count} {what}, {readable_bytes(path.stat().st_size)}")


def standard_library_documents() -> Iterator[Document]:
    """Sources in the order of their names, then the reference's topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            text = _readable(path)
            if text:
                yield Document("/".join(parts), text)
    yield from _reference_topics()


def _readable(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _reference_topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Document(f"topic {name}", text)


def library_questions(document: Document) -> Iterator[Mapping[str, Any]]:
    """Records `question`, `answers`, `contexts` of one source file; none for text that is no source."""
    if not document.name.endswith(".py"):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in sources
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    lines = document.text.splitlines(keepends=True)
    for name, node in _definitions(tree, ()):
        answer = _first_sentence(ast.get_docstring(node) or "")
        passage = "".join(lines[node.lineno - 1 : node.end_lineno])[:_PASSAGE_CHARACTERS].rstrip()
        if len(answer) in _ANSWER_LENGTHS:
            is_class = isinstance(node, ast.ClassDef)
            question = f"What is {module}.{name}?" if is_class else f"What does {module}.{name} do?"
            yield {"question": question, "answers": [answer], "contexts": [{"title": module, "text": passage}]}


def _definitions(parent: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[str, _Definition]]:
    """Public functions, classes and methods with their dotted names."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, _Definition) and not node.name.startswith("_"):
            yield ".".join((*path, node.name)), node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, (*path, node.name))


def _first_sentence(text: str) -> str:
    """Of the first paragraph; empty if it does not begin as a sentence does."""
    paragraph = " ".join(text.strip().split("\n\n", 1)[0].split())
    sentence = re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]
    return sentence if re.match(r"[A-Z][a-z]+ ", sentence) and sentence.endswith(".") else ""
