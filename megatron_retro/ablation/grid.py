"""From the text of a study to its runs: axes, their product, and every value checked before anything starts."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_retro.config.evaluation import AblationConfig
from megatron_retro.config.fields import FieldSpec
from megatron_retro.config.settings import specs_by_name
from megatron_retro.config.toml_files import nearest, parse_toml, toml_value
from megatron_retro.errors import ConfigError

CASE = "case"
SEED = "seed"
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Choice:
    """One value of an axis: how it is called, and the fields that it sets."""

    label: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """What is varied, and the values in the order of the study; the first is the baseline."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Cell:
    """One run: a choice of every axis."""

    choices: Mapping[str, Choice]

    @property
    def changes(self) -> dict[str, Any]:
        """All fields that make this run what it is."""
        return {name: value for choice in self.choices.values() for name, value in choice.changes.items()}

    @property
    def configuration(self) -> tuple[str, ...]:
        """The labels of everything but the seed: runs that share it are repetitions of one another."""
        return tuple(choice.label for axis, choice in self.choices.items() if axis != SEED)

    @property
    def seed(self) -> str:
        """The label of the seed, empty when the study has one seed alone."""
        return self.choices[SEED].label if SEED in self.choices else ""

    @property
    def name(self) -> str:
        words = ",".join(f"{axis}={choice.label}" for axis, choice in self.choices.items()) or "only"
        plain = re.sub(r"[^A-Za-z0-9._=,-]+", "-", words)
        if plain == words and len(words) <= _LONGEST_NAME:
            return words
        return f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def study_axes(config: AblationConfig, sections: Sequence[type]) -> tuple[Axis, ...]:
    """The axes of a study, the seed last; `sections` are those of the runs' verb."""
    known = {name: spec for name, (_, spec) in specs_by_name(sections).items()}
    problems: list[str] = []
    axes = _case_axes(config.study_cases, known, problems)
    axes += [axis for text in config.study_grid for axis in _grid_axes(text, known, problems)]
    problems += _collisions(axes)
    if not axes:
        problems.append("nothing is varied; give study_grid or study_cases")
    if problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"the study has {len(problems)} problem(s):\n{listed}")
    return tuple(sorted(axes, key=lambda axis: axis.name == SEED))


def study_cells(axes: Sequence[Axis]) -> list[Cell]:
    """All runs, the baseline's first, seeds innermost."""
    names = [axis.name for axis in axes]
    products = itertools.product(*(axis.choices for axis in axes))
    return [Cell(dict(zip(names, choices, strict=True))) for choices in products]


def _grid_axes(text: str, known: Mapping[str, FieldSpec], problems: list[str]) -> list[Axis]:
    axes = []
    for field, values in parse_toml(text, f"study_grid {text!r}").items():
        if not isinstance(values, list) or not values:
            problems.append(f"study_grid {field}: expected a list of values, as {field} = [1, 2]")
            continue
        changes = [{field: value} for value in values]
        found = [problem for change in changes for problem in _field_problems("study_grid", change, known)]
        problems += dict.fromkeys(found)
        if not found:
            choices = tuple(Choice(_label(value), change) for value, change in zip(values, changes, strict=True))
            axes.append(Axis(field, choices))
    return axes


def _case_axes(texts: Sequence[str], known: Mapping[str, FieldSpec], problems: list[str]) -> list[Axis]:
    """`name = {..}` is a value of the axis "case", `axis.name = {..}` one of an axis of its own."""
    choices: dict[str, list[Choice]] = {}
    for text in texts:
        for name, table in parse_toml(text, f"study_cases {text!r}").items():
            named = isinstance(table, dict) and table and all(isinstance(value, dict) for value in table.values())
            for label, changes in table.items() if named else [(name, table)]:
                if isinstance(changes, dict):
                    problems += _field_problems(f"study_cases {label}", changes, known)
                    choices.setdefault(name if named else CASE, []).append(Choice(label, changes))
                else:
                    problems.append(f"study_cases {name}: expected a table of fields, as {name} = {{lr = 1e-3}}")
    return [Axis(axis, tuple(values)) for axis, values in choices.items()]


def _field_problems(where: str, changes: Mapping[str, Any], known: Mapping[str, FieldSpec]) -> list[str]:
    problems = []
    for field, value in changes.items():
        if field not in known:
            problems.append(f"{where}: {field} is no setting of these runs{nearest(field, known)}")
        elif field in ("save", "eval_output"):
            problems.append(f"{where}: {field} is set by the study, one directory per run")
        elif (expected := known[field].problem(value)) is not None:
            problems.append(f"{where}: {field} = {value!r}: expected {expected}")
    return problems


def _collisions(axes: Sequence[Axis]) -> list[str]:
    """A field set by two axes, and a value that is in one axis twice."""
    problems = []
    owners: dict[str, str] = {}
    for axis in axes:
        labels = [choice.label for choice in axis.choices]
        problems += [f"{axis.name}: {label} is there twice" for label in sorted(set(labels)) if labels.count(label) > 1]
        for field in sorted({field for choice in axis.choices for field in choice.changes}):
            if owners.setdefault(field, axis.name) != axis.name:
                problems.append(f"{field} is set by {owners[field]} and by {axis.name}")
    names = [axis.name for axis in axes]
    twice = {name for name in names if names.count(name) > 1}
    return problems + [f"{name} is varied twice; write one list" for name in sorted(twice)]


def _label(value: Any) -> str:
    return value if isinstance(value, str) else toml_value(tuple(value) if isinstance(value, list) else value)
