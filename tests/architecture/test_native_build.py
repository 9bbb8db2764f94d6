"""What is compiled again: a file whose own headers changed, where its compiler finds them, and no other."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CSRC))
    import build_toolchain

    monkeypatch.setattr(build_toolchain, "CACHE", tmp_path / "cache")
    return build_toolchain


def test_only_what_reads_a_changed_header_is_compiled_again(toolchain: ModuleType, tmp_path: Path) -> None:
    try:
        compiler = toolchain.host_compiler()
    except toolchain.CompilerMissing as problem:
        pytest.skip(str(problem))
    for name, text in {
        "own/first.cpp": '#include "deep.h"\nint first() { return DEEP; }\n',
        "own/second.cpp": '#ifdef SHIM\n#include "shim.h"\n#endif\nint second() { return 2; }\n',
        "own/deep.h": '#include "deeper.h"\n',
        "own/deeper.h": "#define DEEP 1\n",
        "shim/shim.h": "\n",
        "shim/deeper.h": "#define DEEP 3\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    sources = [tmp_path / "own/first.cpp", tmp_path / "own/second.cpp"]
    units = [toolchain.Unit(source, (compiler,)) for source in sources]
    units += [toolchain.Unit(sources[1], (compiler, "-DSHIM", f"-I{tmp_path / 'shim'}"), "shim")]
    before = toolchain.compile_all(units)
    assert toolchain.compile_all(units) == before and all(path.is_file() for path in before)
    for header, again in (("own/deeper.h", [0]), ("shim/shim.h", [2]), ("shim/deeper.h", [])):
        (tmp_path / header).write_text((tmp_path / header).read_text() + "// changed\n")
        after = toolchain.compile_all(units)
        assert [number for number, (one, other) in enumerate(zip(before, after, strict=True)) if one != other] == again
        before = after


def test_another_checkout_of_the_same_sources_needs_no_compiling(
    toolchain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for name in ("here", "there"):
        source = tmp_path / name / "csrc" / "first.cpp"
        source.parent.mkdir(parents=True)
        source.write_text("int first() { return 1; }\n")
        monkeypatch.setattr(toolchain, "ROOT", source.parent)
        keys.append(toolchain.key_of(toolchain.Unit(source, ("true", f"-I{source.parent}"))))
    assert keys[0] == keys[1]


def test_every_header_of_ours_is_found_or_is_the_shims(toolchain: ModuleType) -> None:
    """A header that the scan overlooked would leave a stale library; the shim's are for builds that see its folder."""
    import build_operators

    root = build_operators.SOURCES
    found = {
        path
        for source in [*root.glob("*.cpp"), *root.glob("cpu/*.cpp"), *root.glob("cuda/*.cu")]
        for path in toolchain.read_files(toolchain.Unit(source, (f"-I{root}",)))
    }
    assert set(root.rglob("*.h")) | set(root.rglob("*.cuh")) <= found
