"""The layer table of pyproject.toml, read from the imports of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:
    import tomlkit as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_retro"
TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["megatron_retro"]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def package_edges(root: Path) -> dict[tuple[str, str], str]:
    """(importing package, imported package) -> one file that does it."""
    edges: dict[tuple[str, str], str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for module in imported_modules(path):
            words = module.split(".")
            if words[0] == "megatron_retro" and len(words) > 1 and words[1] != parts[0]:
                edges[parts[0], words[1]] = str(path.relative_to(root))
    return edges


def violations(
    edges: Mapping[tuple[str, str], str], layers: Mapping[str, int], forbidden: Mapping[str, list[str]]
) -> list[str]:
    found = []
    for (source, target), path in edges.items():
        if source not in layers or target not in layers:
            found.append(f"{path}: {source} or {target} is in no layer")
        elif layers[target] >= layers[source] or target in forbidden.get(source, []):
            found.append(f"{path}: {source} (layer {layers[source]}) imports {target} (layer {layers[target]})")
    return found


def test_imports_point_down() -> None:
    assert violations(package_edges(PACKAGE), TABLE["layers"], TABLE["forbidden"]) == []


def test_every_package_has_a_layer() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()} | {
        "errors",
        "microbatch",
        "api",
    }
    assert names == set(TABLE["layers"])


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("model/planted.py", "import megatron_retro.parallel.mesh"),
        ("training/planted.py", "from megatron_retro.retrieval import query"),
        ("data/planted.py", "def f():\n    from megatron_retro.model import retro"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, place: str, line: str) -> None:
    planted = tmp_path / place
    planted.parent.mkdir()
    planted.write_text(line)
    assert len(violations(package_edges(tmp_path), TABLE["layers"], TABLE["forbidden"])) == 1


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = module_graph(PACKAGE)
    assert circles(graph) == []


def module_graph(root: Path) -> dict[str, set[str]]:
    """Imports at module level between the modules of the package."""
    names = {
        "megatron_retro." + ".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & set(names)) - {name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(trail[trail.index(name) :])
            return
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]
