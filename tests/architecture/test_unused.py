"""What only tests call is not part of the product: it goes, or it stands here with its reason."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = re.compile(r"^(?:megatron_retro\.)?([a-z_.]+)[:.](\w+)$")
PACKAGE = ROOT / "megatron_retro"
# Reviewed exceptions: module -> names, and why the product keeps them.
KEPT: dict[str, tuple[set[str], str]] = {
    "api": ({"Model.encode_neighbors"}, "the face for Python"),
    "convert.modeling_megatron_retro": ({"MegatronRetroForCausalLM"}, "transformers finds it in an exported folder"),
    "inference.lm_eval_adapter": ({"MegatronRetroLM"}, "lm-eval finds it by its name"),
    "model.initialization": ({"initialize"}, "a whole model in a notebook gets its first values"),
    "peft.attach": ({"initialize"}, "so does what is tuned beside it"),
}
# Classes whose methods a library calls.
CALLED_BY_LIBRARIES = {
    "Module",
    "Function",
    "StorageReader",
    "StorageWriter",
    "PreTrainedModel",
    "TemplateLM",
    "RawIOBase",
    "Unpickler",
    "NodeTransformer",
    "PipelineStage",
}


def listed(pattern: str) -> list[Path]:
    found = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in found.split() if (ROOT / name).is_file()]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def is_test(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tests") or path.is_relative_to(PACKAGE / "testing")


def names_used(tree: ast.AST) -> Counter[str]:
    """Names and attributes that are read, and those that a string gives as a row of verbs does: `module:function`."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(name for _, name in PATH.findall(node.value))
    return found


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that is imported from the package; a module as a whole has the name *."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from PATH.findall(node.value)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_retro"):
            for alias in node.names:
                yield (node.module or "").removeprefix("megatron_retro."), alias.name
                yield f"{node.module}.{alias.name}".removeprefix("megatron_retro."), "*"


def unused(sources: dict[str, ast.Module], users: list[ast.AST]) -> list[str]:
    """Public functions, classes and methods of the package that no user of it needs, and not their own module."""
    imported = {pair for tree in users for pair in imports_of(tree)}
    everywhere = Counter[str]()
    for tree in users:
        everywhere += names_used(tree)
    found = []
    for module, tree in sources.items():
        here = names_used(tree)
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            by_name = (module, node.name) in imported or ((module, "*") in imported and everywhere[node.name])
            if not node.name.startswith("_") and not by_name and here[node.name] <= names_used(node)[node.name]:
                found.append(f"{module}:{node.name}")
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases}
                found += [
                    f"{module}:{node.name}.{each.name}"
                    for each in node.body
                    if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))
                    and not each.name.startswith("_")
                    and not bases & CALLED_BY_LIBRARIES
                    and everywhere[each.name] == 0
                ]
    return found


def test_nothing_is_there_for_tests_alone() -> None:
    sources = {module_name(path): ast.parse(path.read_text()) for path in listed("megatron_retro/*.py")}
    product = {name: tree for name, tree in sources.items() if not name.startswith("testing.")}
    others = [path for path in listed("*.py") if not is_test(path) and not path.is_relative_to(PACKAGE)]
    users: list[ast.AST] = [*product.values(), *(ast.parse(path.read_text()) for path in others)]
    text = " ".join(path.read_text() for pattern in ("tools/*", "*.toml", "*.sh") for path in listed(pattern))
    kept = {f"{module}:{name}" for module, (names, _) in KEPT.items() for name in names}
    found = [each for each in unused(product, users) if each not in kept and each.split(":")[1] not in text]
    assert found == [], "only tests need these: remove them, or move them to megatron_retro/testing"


def test_every_exception_is_needed() -> None:
    for module, (names, _) in KEPT.items():
        path = PACKAGE / (module.replace(".", "/") + ".py")
        there = {getattr(node, "name", None) for node in ast.walk(ast.parse(path.read_text()))}
        assert {name.split(".")[-1] for name in names} <= there


@pytest.mark.parametrize(
    ("source", "user", "expected"),
    [
        ("def lone(): ...", "", ["a:lone"]),
        ("def used(): ...\nused()", "", []),
        ("def used(): ...", "from megatron_retro.a import used", []),
        ("def recursive():\n    recursive()", "", ["a:recursive"]),
        ("class Held:\n    def told(self): ...\n\nHeld()", "", ["a:Held.told"]),
        ("class Held:\n    def told(self): ...\n\nHeld().told()", "", []),
        ("class Held(nn.Module):\n    def forward(self): ...\n\nHeld()", "", []),
    ],
)
def test_what_is_unused_is_found(source: str, user: str, expected: list[str]) -> None:
    tree = ast.parse(source)
    assert unused({"a": tree}, [tree, ast.parse(user)]) == expected


def test_every_import_of_ours_exists() -> None:
    """Of tests and benchmarks too, which the type checker does not read."""
    names = {module_name(path): words_of(path) for path in listed("megatron_retro/*.py")}
    packages = {module.rpartition(".")[0] for module in names}
    missing = []
    for path in listed("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_retro."):
                module = (node.module or "").removeprefix("megatron_retro.")
                known = {alias.name for alias in node.names if f"{module}.{alias.name}" in names.keys() | packages}
                known |= names.get(module, set())
                missing += [
                    f"{path.relative_to(ROOT)}: {module}.{one.name}" for one in node.names if one.name not in known
                ]
    assert missing == []


def words_of(path: Path) -> set[str]:
    return set(re.findall(r"\w+", path.read_text()))
