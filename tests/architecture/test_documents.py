"""What the documents promise: short lines, links, paths and flags that exist, decisions in one form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_retro.config.command_line import opposite
from megatron_retro.config.fields import field_specs
from megatron_retro.config.megatron_flags import BY_FLAG
from megatron_retro.config.sections import ALL_SECTIONS

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
}
LINE = 119
FOLDERS = ("megatron_retro", "tests", "examples", "benchmarks", "csrc", "tools", "docs")
# Flags of other programs and of ours that are no settings.
NO_SETTINGS = {
    *("--config", "--preset", "--print-config", "--help"),  # every verb
    *("--dry-run", "--nodes", "--partition", "--container-image", "--container-mounts"),  # recipes, as given to SLURM
    *("--full", "--setup-only", "--json", "--inplace"),  # tests/run.sh, benchmarks, setup.py
    *("--nproc-per-node", "--standalone", "--max-restarts", "--master-port"),  # torchrun
    *("--signal", "--batch", "--exclude", "--mpi", "--task-prolog", "--nv"),  # scancel, sbatch, srun and apptainer
    *("--model", "--model_args", "--tasks", "--model-path"),  # lm-eval, SGLang
    "--megatron-defaults",
    *("--read-only", "--vfs-cache-mode", "--vfs-cache-max-size", "--vfs-read-chunk-size", "--cache-dir"),  # rclone
    *("--no-build-isolation", "--config-settings", "--build-option", "--cpp_ext", "--cuda_ext"),  # pip
}
LABELS = ["Question", "Choice", "Measured", "Would change it"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lines_are_short(name: str) -> None:
    lines = DOCUMENTS[name].read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > LINE] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    page = DOCUMENTS[name]
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if not target.startswith("http"):
            found = page.parent / target if target else page
            assert found.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(found), f"{name}: {target}#{anchor}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)", DOCUMENTS[name].read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_exist(name: str) -> None:
    settings = {spelling for section in ALL_SECTIONS for spec in field_specs(section) for spelling in spec.spellings}
    known = settings | {opposite(flag) for flag in settings} | NO_SETTINGS | set(BY_FLAG)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", DOCUMENTS[name].read_text())) - known == set()


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_study_of_the_experiments_exists() -> None:
    studies = {path.stem for path in (ROOT / "examples" / "studies").glob("*.toml")}
    text = DOCUMENTS["docs/experiments.md"].read_text()
    named = re.findall(r"study\.sh (\w+)", text) + re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert len(named) > 20 and set(named) - {"NAME"} - studies == set()


def decisions() -> dict[str, str]:
    parts = re.split(r"^### (.+)$", (ROOT / "docs" / "decisions.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_area_of_decisions_is_in_its_contents() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text()
    areas = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert re.findall(r"\[([^\]]+)\]\(#", text.split("\n## ")[0]) == areas


@pytest.mark.parametrize("title", decisions())
def test_a_decision_is_dated_and_has_its_four_lines(title: str) -> None:
    text = decisions()[title]
    assert re.match(r"\n\n20\d\d-\d\d-\d\d\n\n- \*\*", text), "the date stands alone under the title"
    assert re.findall(r"^- \*\*(.+?):\*\*", text, flags=re.MULTILINE) == LABELS
