"""The walks of docs/architecture.md name files and functions that exist, and no more of them than they promise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_retro"
# Title of a walk -> the most files that it may take.
LONGEST = {
    "A token, from JSONL to the loss": 20,
    "A neighbour's id, from the table to the softmax": 12,
    "A flag, from argv to its effect": 8,
}


def walk(title: str) -> list[tuple[str, list[str]]]:
    """The files of a walk, each with the names to read in it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split(f"### {title}\n")[1].split("\n## ")[0].split("\n### ")[0]
    steps = re.findall(r"^\d+\. `([\w/]+\.py)`((?:\s+`[\w.]+`)+):", section, flags=re.MULTILINE)
    assert len(steps) == len(re.findall(r"^\d+\.", section, flags=re.MULTILINE)), (
        "a step names a file, then names in it"
    )
    return [(path, re.findall(r"`([\w.]+)`", names)) for path, names in steps]


def defined_names(tree: ast.Module) -> set[str]:
    """Classes, functions, methods and constants of a module."""
    names = {target.id for node in tree.body for target in targets(node)}
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return names


def targets(node: ast.stmt) -> list[ast.Name]:
    found = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target for target in found if isinstance(target, ast.Name)]


@pytest.mark.parametrize("title", LONGEST)
def test_every_step_exists(title: str) -> None:
    for path, names in walk(title):
        assert (PACKAGE / path).is_file(), path
        assert set(names) <= defined_names(ast.parse((PACKAGE / path).read_text())), path


@pytest.mark.parametrize("title", LONGEST)
def test_a_walk_is_as_short_as_it_promises(title: str) -> None:
    files = [path for path, _ in walk(title)]
    assert len(set(files)) == len(files) and 0 < len(files) <= LONGEST[title]
