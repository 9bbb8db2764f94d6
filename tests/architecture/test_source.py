"""What every source file promises: docstrings, sizes, no mutable module state, no assert on input, clean tools."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "megatron_retro").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 350, 60
CODE = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".toml")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_module(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
        if isinstance(node, ast.Assert) and "testing" not in path.parts:
            assert narrows_a_type(node.test), f"line {node.lineno}: an assert that could speak of input; raise an error"


def test_sizes() -> None:
    """Files and functions that one reads in a sitting: the package, its kernels, tests, benchmarks and examples."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {name: (ROOT / name).read_text() for name in listed if name.endswith(CODE) and (ROOT / name).is_file()}
    assert {name: text.count("\n") for name, text in texts.items() if text.count("\n") > FILE_LINES} == {}
    functions = {
        f"{name} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, text in texts.items()
        if name.endswith(".py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: lines for name, lines in functions.items() if lines > FUNCTION_LINES} == {}


def narrows_a_type(test: ast.expr) -> bool:
    """`x is not None`, `isinstance(x, T)`, or both: what the type checker needs to hear and no input can break."""
    if isinstance(test, ast.BoolOp):
        return all(narrows_a_type(value) for value in test.values)
    if isinstance(test, ast.Compare):
        return all(isinstance(operator, ast.IsNot) for operator in test.ops)
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def test_ruff() -> None:
    run([sys.executable, "-m", "ruff", "check", "."])
    run([sys.executable, "-m", "ruff", "format", "--check", "."])


@pytest.mark.long
def test_mypy_strict() -> None:
    """torch gains types with every version: with another than the locked one an `ignore` may have nothing to ignore."""
    locked = f"torch=={version('torch').split('+')[0]}" in (ROOT / ".ci/constraints.txt").read_text().splitlines()
    run([sys.executable, "-m", "mypy", *([] if locked else ["--no-warn-unused-ignores"])])


def test_shell_scripts() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    scripts = [name for name in listed if (ROOT / name).is_file() and is_shell(ROOT / name)]
    assert "tests/run.sh" in scripts
    run([str(Path(sys.executable).parent / "shellcheck"), "--external-sources", *scripts])
    for name in scripts:
        text = (ROOT / name).read_text()
        assert "set -euo pipefail" in text or text.startswith("# shellcheck shell=bash"), name
        assert not re.search(r"\beval ", text), name


def is_shell(path: Path) -> bool:
    return path.suffix in (".sh", ".sbatch") or path.read_bytes()[:20].startswith(b"#!/usr/bin/env bash")


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_json_is_strict() -> None:
    """NaN and Infinity are no JSON: `json_text` writes null for them, and what does not go through it refuses them."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                refused = [key for key in node.keywords if key.arg == "allow_nan"]
                assert refused and ast.unparse(refused[0].value) == "False", f"{path}:{node.lineno}: use json_text"


def test_no_pickle_is_loaded_from_disk() -> None:
    """One module unpickles, through a class that chooses every name; torch.load and np.load take plain values alone."""
    for path in SOURCES:
        faults = unpickling(ast.parse(path.read_text()))
        if path.name == "foreign_pickles.py":
            assert faults == ["pickle.Unpickler"], faults
        elif "testing" not in path.parts:
            assert faults == [], (path, faults)


def unpickling(tree: ast.AST) -> list[str]:
    """Where a module could build objects that a file names."""
    found = []
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"(c?[pP]ickle|dill|joblib|shelve|marshal)\.(load|loads|Unpickler|open)", name):
            found.append(name)
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib", "shelve", "marshal"):
            found.append(f"from {node.module}")
        if isinstance(node, ast.Call):
            told = {key.arg: ast.unparse(key.value) for key in node.keywords}
            if ast.unparse(node.func) == "torch.load" and told.get("weights_only") != "True":
                found.append("torch.load")
            if ast.unparse(node.func) == "np.load" and told.get("allow_pickle", "False") != "False":
                found.append("np.load")
    return found


def test_a_pickle_that_is_loaded_is_seen() -> None:
    for text in ("pickle.loads(x)", "class A(pickle.Unpickler): pass", "from pickle import load", "torch.load(x)"):
        assert unpickling(ast.parse(text)), text
    assert unpickling(ast.parse("torch.load(x, weights_only=True)\npickle.UnpicklingError")) == []
