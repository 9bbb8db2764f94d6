"""Steps that may fail, hang or not apply, and the file that says so of each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_retro.artifacts.files import write_file
from megatron_retro.runtime.console import say
from megatron_retro.runtime.strict_json import json_text, to_plain

OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"
ROOT = Path(__file__).parents[2]
_LAST_LINES = 15


class Skip(Exception):
    """A step does not apply here; the message says why."""


class Failure(Exception):
    """A step went wrong; the message holds the last lines."""


class TimedOut(Exception):
    """A step's time is over."""


@dataclass
class Stage:
    """Where a step works: its folder, whether there is a GPU, and until when (`time.monotonic`)."""

    folder: Path
    gpu: bool
    until: float

    def run(self, *command: str, allowed: Sequence[int] = (0,), **variables: str) -> str:
        """What a command printed. It ends with the step's time, with everything that it started."""
        process = self.start(*command, **variables)
        try:
            output, _ = process.communicate(timeout=max(0.1, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            end(process)
            raise TimedOut(last_lines(process.communicate()[0])) from None
        if process.returncode not in allowed:
            raise Failure(f"{command_line(command)} ended with {process.returncode}\n{last_lines(output)}")
        return output

    def start(self, *command: str, output: int | TextIO = subprocess.PIPE, **variables: str) -> subprocess.Popen[str]:
        """A process in a group of its own."""
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def python(self, *words: str, **variables: str) -> str:
        """What this Python prints for these words."""
        return self.run(sys.executable, *words, **variables)


@dataclass(frozen=True)
class Step:
    """A named piece of work that returns figures, and how many seconds it may take."""

    name: str
    seconds: float
    work: Callable[[Stage], Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    name: str
    outcome: str
    seconds: float
    limit_seconds: float
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def run_steps(
    steps: Sequence[Step], room: Path, about: Mapping[str, Any], result: Path, *, gpu: bool, seconds: float
) -> list[Outcome]:
    """Every step in turn, none longer than its limit or what is left of `seconds`; the file is whole after each."""
    end_of_all, outcomes = time.monotonic() + seconds, list[Outcome]()
    for step in steps:
        say(f"== {step.name}")
        limit = min(step.seconds, end_of_all - time.monotonic())
        outcomes.append(outcome_of(step, room / step.name, limit, gpu=gpu))
        say(f"   {outcomes[-1].outcome} after {outcomes[-1].seconds:.0f} s {outcomes[-1].reason}".rstrip())
        content = {**about, "complete": len(outcomes) == len(steps), "steps": to_plain(outcomes)}
        write_file(result, json_text(content, indent=1) + "\n")
    return outcomes


def outcome_of(step: Step, folder: Path, limit: float, *, gpu: bool) -> Outcome:
    """Do a step; whatever it raises is an outcome."""
    began = time.monotonic()
    if limit <= 1.0:
        return Outcome(step.name, SKIPPED, 0.0, step.seconds, "the time of all steps is over")
    folder.mkdir(parents=True)
    figures: Mapping[str, Any] = {}
    try:
        figures = step.work(Stage(folder, gpu, began + limit))
        kind, reason = OK, ""
    except Skip as error:
        kind, reason = SKIPPED, str(error)
    except TimedOut as error:
        kind, reason = TIMED_OUT, str(error)
    except Failure as error:
        kind, reason = FAILED, str(error)
    except Exception as error:
        kind, reason = FAILED, f"{type(error).__name__}: {error}"
    return Outcome(step.name, kind, round(time.monotonic() - began, 1), round(limit, 1), reason, figures)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def last_lines(text: str) -> str:
    """The end of an output."""
    return "\n".join(text.strip().splitlines()[-_LAST_LINES:])


def command_line(command: Sequence[str]) -> str:
    """A command as a person would know it: without this machine's path of Python."""
    return " ".join("python" if word == sys.executable else word for word in command)[:200]
