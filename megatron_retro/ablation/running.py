"""Runs the cells of a study: each in a process of its own, claimed by one worker, going on where it stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_retro.ablation.directories import (
    CellDirectory,
    Outcome,
    cell_directory,
    cell_settings,
    render_recipe,
)
from megatron_retro.ablation.grid import Cell
from megatron_retro.ablation.shortage import neighbor_shortage
from megatron_retro.artifacts.claims import BlockClaims
from megatron_retro.artifacts.files import write_file
from megatron_retro.config.evaluation import PERPLEXITY
from megatron_retro.config.settings import Settings
from megatron_retro.errors import Requeue
from megatron_retro.runtime.console import readable_seconds, say
from megatron_retro.runtime.run_log import EVENTS
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.runtime.workers import Worker

_POLL_SECONDS = 0.05
_MESSAGE_BYTES = 2000
_PLACE_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")
_PLACE_PREFIXES = ("SLURM_STEP_", "OMPI_COMM_WORLD_", "PMI_")


@dataclass(frozen=True)
class Study:
    """What is run and where; `settings` hold what the runs have in common, `sections` are those of their verb."""

    output: Path
    verb: str
    launcher: tuple[str, ...]
    settings: Settings
    sections: tuple[type, ...]
    cells: Sequence[Cell]

    def directory(self, cell: Cell) -> CellDirectory:
        """Where a run lives."""
        return cell_directory(self.output, cell)

    def command(self, cell: Cell) -> list[str]:
        """The command of a run."""
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
