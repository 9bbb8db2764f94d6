"""The first hour of a machine with a GPU, in ten minutes: what is built, right, fast, resumes and searches.

    benchmarks/first_hour.sh [--cpu] [--only STEP ...] [--json FILE]

Each step is a process with a time limit; its outcome (ok, failed with its last lines, timed out, skipped with the
reason) and its figures stand in the file. Without a GPU, or with --cpu, each step runs its small form or is skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from outcomes import FAILED, OK, ROOT, TIMED_OUT, Outcome, run_steps
from steps import STEPS

from megatron_retro.runtime.console import render_table, say, warn
from megatron_retro.testing.benchmarking import hardware, versions

SECONDS = 600.0


def main() -> int:
    """1 if a step failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--cpu", action="store_true", help="small forms, as where there is no GPU")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/first_hour.json, first_hour_cpu.json")
    parser.add_argument("--keep", type=Path, help="a folder that does not exist yet, for runs and profiles")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available() and not arguments.cpu
    if not gpu and not arguments.cpu and (named := gpus_of_the_driver()):
        warn(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use {named}: install a torch of a CUDA that "
            "the driver knows, or give --cpu"
        )
        return 2
    name = "first_hour.json" if gpu else "first_hour_cpu.json"
    result = arguments.json or ROOT / "benchmarks" / "results" / name
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if gpu else ""
    with tempfile.TemporaryDirectory(prefix="first-hour-") as folder:
        room = arguments.keep or Path(folder) / "room"
        outcomes = run_steps(
            [step for step in STEPS if step.name in arguments.only],
            room,
            about(gpu),
            result,
            gpu=gpu,
            seconds=SECONDS,
        )
    rows = [(each.name, each.outcome, f"{each.seconds:.0f} s", first_line(each)) for each in outcomes]
    print(render_table(("step", "outcome", "time", ""), rows))
    say(f"wrote {result}")
    return int(any(each.outcome in (FAILED, TIMED_OUT) for each in outcomes))


def gpus_of_the_driver() -> str:
    """What nvidia-smi names, in one line; empty where it names nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    said = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    return said.stdout.strip().replace("\n", ", ") if said.returncode == 0 else ""


def about(gpu: bool) -> dict[str, object]:
    """When, on what, with which versions."""
    return {
        "command": "benchmarks/first_hour.sh" + ("" if gpu else " --cpu"),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware(),
        "versions": {**versions(), "cuda": str(torch.version.cuda)},
    }


def first_line(outcome: Outcome) -> str:
    """Why, in a line of a table."""
    return (outcome.reason.splitlines() or [""])[0][:80] if outcome.outcome != OK else ""


if __name__ == "__main__":
    sys.exit(main())
