"""The locks hold what pyproject.toml asks for, in the versions that the tests run with."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import tomlkit

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8")).unwrap()["project"]
LOCKS = sorted((ROOT / ".ci/locks").glob("*.txt"))
LOOKED_AT = {"chardet": "LGPL, loaded unchanged by what writes lm-eval's tables; nothing of ours imports it"}


def asked(extras: list[str]) -> set[str]:
    """Names of what the package and these extras need, extras of extras too; torch comes from elsewhere."""
    names: set[str] = set()
    pending = [*PROJECT["dependencies"], *(one for extra in extras for one in PROJECT["optional-dependencies"][extra])]
    for requirement in pending:
        if match := re.fullmatch(r"megatron-retro\[(.*)\]", requirement):
            names |= asked(match[1].split(","))
        else:
            names.add(canonical(re.split(r"[\[<>=;~ ]", requirement)[0]))
    return names - {"torch"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def held(lock: Path) -> dict[str, set[str]]:
    """Name -> versions; Pythons differ."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", lock.read_text(), re.MULTILINE):
        found.setdefault(canonical(name), set()).add(version)
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_holds_what_is_asked_for(lock: Path) -> None:
    missing = asked(lock.stem.split(",")) - held(lock).keys()
    assert not missing, f"run .ci/lock.sh: {', '.join(sorted(missing))}"


def test_the_pins_are_those_of_the_lock() -> None:
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / ".ci/constraints.txt").read_text(), re.MULTILINE)
    versions = held(ROOT / ".ci/locks/dev.txt")
    other = [f"{name}=={pin}" for name, pin in pins if name != "torch" and pin not in versions.get(canonical(name), ())]
    assert not other, f"run .ci/lock.sh: {', '.join(other)}"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the list is of Python 3.11's versions")
def test_the_licence_of_every_package_is_listed() -> None:
    """Other systems need some that are not here. Licences that bind who links are a reason to look again."""
    program = runpy.run_path(str(ROOT / ".ci/licenses.py"))
    listed = dict(line.split(": ", 1) for line in program["LISTED"].read_text(encoding="utf-8").splitlines())
    other = {name: said for name, said in program["installed"]().items() if listed.get(name) != said}
    assert not other, f"run .ci/licenses.py: {other}"
    assert len(listed) > 0.9 * len(held(ROOT / ".ci/locks/dev.txt"))
    bound = {name for name, said in listed.items() if "GPL" in said or said == "not said"}
    assert bound == LOOKED_AT.keys()
