"""The runs of a study: where each lives, what it is told, and how it is run: in a process of its own, claimed by one
worker, going on where it stopped.

STUDY/study.json                raw results of every run      STUDY/report.html
STUDY/cells/NAME/settings.toml  the run as a recipe           STUDY/cells/NAME/run/      what --save names
STUDY/cells/NAME/output.log     what it printed               STUDY/cells/NAME/outcome.json
STUDY/claims/                   who works on what
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megatron_retro.ablation.grid import Axis, Cell
from megatron_retro.artifacts.claims import BlockClaims
from megatron_retro.artifacts.files import write_file
from megatron_retro.config.data import DataConfig
from megatron_retro.config.evaluation import PERPLEXITY
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings, section_name
from megatron_retro.config.toml_files import toml_value
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.dataset import short_rows
from megatron_retro.errors import ArtifactError, Requeue
from megatron_retro.runtime.console import readable_seconds, say
from megatron_retro.runtime.launch import Worker
from megatron_retro.runtime.run_log import EVENTS
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.runtime.strict_json import json_text

_POLL_SECONDS = 0.05
_MESSAGE_BYTES = 2000
_MOST_SAMPLES = 2000
_PLACE_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")
_PLACE_PREFIXES = ("SLURM_STEP_", "OMPI_COMM_WORLD_", "PMI_")


@dataclass(frozen=True)
class Outcome:
    """How a run ended; exit code 0 is finished. `seconds` are of all starts; no neighbours, no `shortage`."""

    exit_code: int
    seconds: float
    ended: float
    message: str = ""
    shortage: float | None = None


@dataclass(frozen=True)
class CellDirectory:
    """The directory of one run."""

    path: Path

    @property
    def run(self) -> Path:
        """What --save names."""
        return self.path / "run"

    @property
    def settings(self) -> Path:
        return self.path / "settings.toml"

    @property
    def output(self) -> Path:
        """What the run printed."""
        return self.path / "output.log"

    def outcome(self) -> Outcome | None:
        """How it ended, or None."""
        path = self.path / "outcome.json"
        if not path.is_file():
            return None
        try:
            return Outcome(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is no outcome of a run", got=error, fix="remove it to run it again") from None

    def end(self, outcome: Outcome) -> None:
        """Write down how it ended."""
        write_file(self.path / "outcome.json", json_text(asdict(outcome), indent=1) + "\n")

    def refuse_other(self, recipe: str) -> None:
        """A directory of other settings is refused, for its results would be mixed up."""
        if self.settings.is_file() and self.settings.read_text() != recipe:
            raise ArtifactError(
                f"{self.path} was run with other settings",
                got=_first_difference(recipe, self.settings.read_text()),
                fix="give another --study-output, or remove that directory",
            )


def cell_directory(study: Path, cell: Cell) -> CellDirectory:
    """Where a run of the study lives."""
    return CellDirectory(study / "cells" / cell.name)


def cell_settings(settings: Settings, cell: Cell, sections: Sequence[type]) -> Settings:
    """The settings of a run, only the sections of its verb."""
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in cell.changes.items()}
    return Settings([settings[section] for section in sections], settings.origins()).replace(**changes)


def render_recipe(settings: Settings) -> str:
    """All fields that someone set, as a recipe: a value that was set to the default is still no default to a verb that
    inherits settings."""
    lines: list[str] = []
    for section in settings:
        given: dict[str, Any] = {
            field.name: getattr(section, field.name)
            for field in fields(section)
            if settings.origin(field.name) != DEFAULT_ORIGIN
        }
        if given:
            lines.append(f"[{section_name(type(section))}]")
            lines += [f"{name} = {toml_value(value)}" for name, value in given.items() if value is not None]
            lines.append("")
    return "\n".join(lines)


@dataclass(frozen=True)
class Study:
    """What is varied, run, and where. `settings` hold what the runs have in common, `sections` are those of their
    verb.
    """

    title: str
    axes: tuple[Axis, ...]
    output: Path
    verb: str
    launcher: tuple[str, ...]
    settings: Settings
    sections: tuple[type, ...]
    cells: Sequence[Cell]

    def directory(self, cell: Cell) -> CellDirectory:
        return cell_directory(self.output, cell)

    def command(self, cell: Cell) -> list[str]:
        place = self.directory(cell)
        verb, output = (
            (["evaluate", PERPLEXITY], "--eval-output") if self.verb == PERPLEXITY else ([self.verb], "--save")
        )
        return [*self.launcher, *verb, "--config", str(place.settings), output, str(place.run)]


def own_launcher() -> tuple[str, ...]:
    """This program, as words before a verb."""
    return sys.executable, "-m", "megatron_retro.cli.main"


def prepare_cells(study: Study) -> None:
    """Write the recipe of every run, or refuse the directory before the first one starts."""
    recipes = [
        (study.directory(cell), render_recipe(cell_settings(study.settings, cell, study.sections)))
        for cell in study.cells
    ]
    for place, recipe in recipes:
        place.refuse_other(recipe)
    for place, recipe in recipes:
        write_file(place.settings, recipe)


def run_cells(study: Study, worker: Worker, stops: StopRequests, ended: Callable[[], object]) -> None:
    """Run whatever is not finished and not another's, and call `ended` after each. Failed runs are tried once more.

    A lone worker waits for others' cells and takes over those of the dead; one of several leaves when all are taken.
    """
    by_name = {cell.name: cell for cell in study.cells}
    start = time.time()
    tried: set[str] = set()

    def is_done(name: str) -> bool:
        outcome = study.directory(by_name[name]).outcome()
        return name in tried or (outcome is not None and (outcome.exit_code == 0 or outcome.ended > start))

    first = worker.share(len(study.cells)).start
    names = [cell.name for cell in [*study.cells[first:], *study.cells[:first]]]
    for name in BlockClaims(study.output / "claims", names, is_done, wait=worker.count == 1):
        tried.add(name)
        _run_cell(study, by_name[name], stops)
        ended()


def _run_cell(study: Study, cell: Cell, stops: StopRequests) -> None:
    place, command = study.directory(cell), study.command(cell)
    say(f"run {cell.name}: {shlex.join(command)}")
    before = place.outcome()
    start, earlier = time.time(), before.seconds if before is not None else 0.0
    code = _until_ended(command, place, stops)
    message = _last_words(place.output) if code else ""
    shortage = None if code else neighbor_shortage(cell_settings(study.settings, cell, study.sections))
    outcome = Outcome(code, earlier + time.time() - start, time.time(), message, shortage)
    place.end(outcome)
    ended = "finished" if code == 0 else f"FAILED with exit code {code}, see {place.output}"
    say(f"run {cell.name}: {ended} after {readable_seconds(outcome.seconds)}")


def _until_ended(command: Sequence[str], place: CellDirectory, stops: StopRequests) -> int:
    """Start it, and again while it asks for that and got further; a request to stop is passed on."""
    while True:
        written = _size(place.run)
        with place.output.open("a") as output:
            code = _one_start(command, output, stops)
        if (reason := stops.reason()) is not None:
            raise Requeue(f"the study stopped early: {reason}", fix="run the same command again to go on")
        if code != Requeue.exit_code or _size(place.run) <= written:
            return code


def _one_start(command: Sequence[str], output: TextIO, stops: StopRequests) -> int:
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=lone_environment(os.environ))
    told = False
    try:
        while process.poll() is None:
            if not told and stops.reason() is not None:
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(_POLL_SECONDS)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process.returncode


def lone_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment without a place among ranks: a worker of a study may be one of many, its run is alone."""
    return {
        name: value
        for name, value in variables.items()
        if name not in _PLACE_OF_A_RANK and not name.startswith(_PLACE_PREFIXES)
    }


def _size(run: Path) -> int:
    """Bytes of the log: a run that got further has written more."""
    log = run / EVENTS
    return log.stat().st_size if log.is_file() else 0


def _last_words(path: Path) -> str:
    """The end of what a run printed; from its last `error:` if there is one."""
    data = path.read_bytes()[-_MESSAGE_BYTES:].decode(errors="replace").strip()
    at = data.rfind("error: ")
    return data[at:] if at >= 0 else "\n".join(data.splitlines()[-5:])


def neighbor_shortage(settings: Settings, *, most_samples: int = _MOST_SAMPLES) -> float | None:
    """Share of the training rows with fewer than k legal neighbours, from at most so many samples of each corpus.

    None for runs that read no neighbours from tables. A database made smaller by `--database-keep-fraction` is read
    from the same table, so rows whose saved neighbours are mostly dropped have fewer than k left: a study over sizes of
    the database must say how often that was.
    """
    if RetroConfig not in settings:  # an evaluation knows its model's and says so itself
        return None
    data, retro = settings[DataConfig], settings[RetroConfig]
    if not retro.retro_add_retriever or data.data_path is None or data.neighbor_path is None or data.mock_data:
        return None
    dataset = build_dataset(Settings([data, retro, settings[TrainingConfig]]), "train", eod=None)
    counts = np.array([short_rows(source, most_samples) for source in dataset.sources])
    weights = np.asarray(dataset.blend.weights, np.float64)
    shares = counts[:, 0] / np.maximum(counts[:, 1], 1)
    return float((weights * shares).sum() / weights.sum())


def _first_difference(wanted: str, found: str) -> str:
    ours, theirs = ({line for line in text.splitlines() if "=" in line} for text in (wanted, found))
    now, then = sorted(ours - theirs)[:1], sorted(theirs - ours)[:1]
    return "; ".join([*(f"now {line}" for line in now), *(f"then {line}" for line in then)])
