"""Scores of the same questions answered by several models, with 95 % intervals over the questions.

python docs/experiments/compared_answers.py closed=DIR cross=DIR --json OUT
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import write_file
from megatron_retro.runtime.console import say
from megatron_retro.runtime.statistics import bootstrap_ratio
from megatron_retro.runtime.strict_json import json_text


def scores(directory: Path, metric: str) -> NDArray[np.float64]:
    """Of every question, in the order of their names."""
    lines = (directory / "squad1.examples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: str(row["id"]))
    return np.array([row["scores"][metric] for row in rows]) * 100


def main() -> int:
    """Each model's mean, and the difference of every two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    folders = {name: Path(folder) for name, _, folder in (text.partition("=") for text in arguments.models)}
    result = {}
    for metric in ("f1", "em"):
        found = {name: scores(folder, metric) for name, folder in folders.items()}
        pairs = {f"{other} - {name}": found[other] - found[name] for name, other in combinations(found, 2)}
        result[metric] = {
            name: bootstrap_ratio(values, np.ones(len(values)), seed=1).to_json()
            for name, values in (found | pairs).items()
        }
        result["questions"] = len(next(iter(found.values())))
    write_file(arguments.json, (json_text(result, indent=1) + "\n").encode())
    say(json_text(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
