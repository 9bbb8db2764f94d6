"""Run every benchmark, print one table, missed targets first, and refresh `benchmarks/results/` (not with --quick).

python benchmarks/run_all.py [--quick] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_retro.runtime.console import render_table, say

FOLDER = Path(__file__).parent
MISSED = "MISSED"


def benchmark_names() -> list[str]:
    """Every program of this folder but this one."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)


def run_one(name: str, results: Path, quick: bool) -> bool:
    """Run a benchmark into its results file; False if it failed."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--json", str(results / f"{name}.json")]
    say(f"== {name}")
    return subprocess.run([*command, "--quick"] if quick else command).returncode == 0


def figure_rows(name: str, results: Path) -> list[tuple[object, ...]]:
    """The figures of a results file as table rows."""
    content = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    figures = content["figures"] if isinstance(content, dict) else content
    signs = {"higher": ">=", "lower": "<="}
    return [
        (
            name,
            figure["name"],
            f"{figure['value']:.4g} {figure['unit']}",
            "" if figure["target"] is None else f"{signs[figure['better']]} {figure['target']:.4g}",
            {True: "met", False: MISSED, None: ""}[figure["met"]],
        )
        for figure in figures
    ]


def main() -> int:
    """Run what was asked for; 1 if a benchmark failed to run (a missed target is a figure, not a failure)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all when none is named")
    parser.add_argument("--quick", action="store_true", help="under a minute each")
    arguments = parser.parse_args()
    names = arguments.names or benchmark_names()
    with tempfile.TemporaryDirectory() as room:  # quick figures are looked at, not kept
        results = Path(room) if arguments.quick else FOLDER / "results"
        failed = [name for name in names if not run_one(name, results, arguments.quick)]
        rows = [row for name in names if name not in failed for row in figure_rows(name, results)]
    missed = [row for row in rows if row[-1] == MISSED]
    print(f"{len(missed)} of {sum(bool(row[3]) for row in rows)} targets missed" + (":" if missed else ""))
    print(
        render_table(
            ("benchmark", "figure", "value", "target", ""), missed + [row for row in rows if row not in missed]
        )
    )
    if failed:
        say(f"failed to run: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
