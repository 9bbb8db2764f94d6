"""Questions about the standard library with their answers, made from its docstrings: no download.

The answer is the first sentence of a function's or class's docstring; the passage is the beginning of its source, which
holds that sentence among other text, as a retrieved passage does. Held-out files are those of the corpus.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_retro.data.standard_library import Document

_ANSWER_LENGTHS = range(20, 141)
_PASSAGE_CHARACTERS = 300
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


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
