"""The runbook has a row for every exit code, alarm and warning, every fault of a node, every reason of the launcher."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_retro import errors
from megatron_retro.training.console_lines import ALARMS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
RUNBOOK = PAGE.split("## When something fails")[1].split("\n## ")[0]
ROWS = [" ".join(row.split()) for row in re.findall(r"^- (.*(?:\n  .*)*)", RUNBOOK, flags=re.MULTILINE)]
SLURM = ROOT / "examples/slurm"


def fixed_words(parts: list[str]) -> str:
    """How a message is known in a log: the first words of its longest line that is the same each time."""
    lines = [line.strip(" ,;:") for part in parts for line in part.splitlines()]
    return " ".join(max(lines, key=len, default="").split()[:5])


def calls_of(names: set[str], folder: Path) -> Iterator[tuple[Path, ast.Call]]:
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in names and node.args:
                    yield path, node


def warnings_of_the_code() -> set[str]:
    """What is given to `warn`; three sentences come from functions beside it."""
    made = {
        "runtime/reach.py": "slow link: ranks ",
        "ops/verdicts.py": "the native kernel",
        "cli/main.py": "defaults that are others here",
    }
    found = set()
    for path, call in calls_of({"warn"}, ROOT / "megatron_retro"):
        words = [str(node.value) for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
        found.add(fixed_words(words) or made[str(path.relative_to(ROOT / "megatron_retro"))])
    return found


def words_of_the_scripts() -> set[str]:
    """Faults of nodes and directories, and why a job is or is not started again."""
    text = "".join((SLURM / name).read_text() for name in ("health_check.sh", "outcome.sh", "launch.sh"))
    told = re.findall(r'\b(?:\w*faults\+=\(|reason=|words=)"([^"]+)"', text)
    kept = [re.split(r"\$\{[^}]*\}|\$\(+[^)]*\)+|\$\w+", words) for words in told]
    return {fixed_words(parts) for parts in kept} - {"$(tail -n 1 <<<"}  # what `reach` said, which has rows


@pytest.mark.parametrize("words", [*ALARMS, "neighbours not used"])
def test_every_alarm_has_a_row(words: str) -> None:
    assert any(row.startswith(f"`{words}") for row in ROWS)
    assert f"`{words}`" in PAGE.split("## When something fails")[0], "where alarms are listed"


def test_alarms_are_all_that_is_told_as_one() -> None:
    """Whatever else happens is news, and known as such."""
    news = {"nothing left to train", "object stores", "saved", "resumed", "settings changed"}
    calls = calls_of({"happened", "_report", "_tell"}, ROOT / "megatron_retro/training")
    told = {call.args[0].value for _, call in calls if isinstance(call.args[0], ast.Constant)}
    assert set(ALARMS) <= told and told - set(ALARMS) <= news, told


@pytest.mark.parametrize("words", sorted(warnings_of_the_code() | words_of_the_scripts()))
def test_every_warning_has_a_row(words: str) -> None:
    shown = " ".join(words.split())
    assert any(shown in row.replace("`", "") for row in ROWS), shown


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.startswith("EXIT_")])
def test_every_exit_code_has_a_row(name: str) -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", RUNBOOK, flags=re.MULTILINE)
    meaning = dict(rows)[str(getattr(errors, name))]
    assert len([cell for cell in meaning.split("|") if cell.strip()]) == 3, "means, happens, do"


def test_every_row_says_what_to_do() -> None:
    assert len(ROWS) > 40
    assert [row for row in ROWS if "*Do:*" not in row] == []
