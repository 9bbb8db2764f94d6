"""Running the sets: ask, score, write predictions as they come, and the table when all are there.

Any number of workers share a set: worker i of N has every N-th question, less those that are answered already by
anyone, and appends to a file of its own. Killed and started again, with more or fewer workers, it goes on.
Predictions made under another protocol or model are refused, never mixed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import make_folder, write_file
from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.errors import ArtifactError, DataError, Requeue
from megatron_retro.evaluation.examples import Example
from megatron_retro.evaluation.prompts import Prompt
from megatron_retro.evaluation.tasks import Scoring, Task, average
from megatron_retro.runtime.console import Progress, render_table
from megatron_retro.runtime.launch import Worker
from megatron_retro.runtime.strict_json import json_text

Answerer = Callable[[Sequence[Prompt]], list[str]]
PromptBuilder = Callable[[Example, Sequence[Passage]], Prompt]
ContextSource = Callable[[Sequence[Example]], list[tuple[Passage, ...]]]


@dataclass(frozen=True)
class Evaluation:
    """One set under one protocol. `identity` is everything that the predictions depend on."""

    task: Task
    examples: Sequence[Example]
    contexts: ContextSource
    build_prompt: PromptBuilder
    answer: Answerer
    scoring: Scoring
    identity: Mapping[str, Any]
    directory: Path
    batch_size: int

    @property
    def fingerprint(self) -> str:
        content = {"task": self.task.name, "ids": [example.id for example in self.examples], **self.identity}
        return hashlib.sha256(json_text(content, sort_keys=True, default=str).encode()).hexdigest()

    def run(self, worker: Worker, stop: Callable[[], str | None] = lambda: None) -> dict[str, Any] | None:
        """Answer this worker's share; the results, once every question has an answer.

        When `stop` gives a reason, `Requeue` is raised: all answers so far are kept.
        """
        _require_distinct(self.examples)
        done = self._predictions()
        mine = [example for example in self.examples[worker.index :: worker.count] if example.id not in done]
        if mine:
            self._answer(mine, self._own_file(worker), stop)
        return self.results()

    def results(self) -> dict[str, Any] | None:
        """What is written once every question has an answer, whoever gave it; None before."""
        done = self._predictions()
        return self._write_results(done) if len(done) == len(self.examples) else None

    def _answer(self, examples: Sequence[Example], path: Path, stop: Callable[[], str | None]) -> None:
        make_folder(path.parent)
        fresh = not _repaired(path)
        with path.open("a", encoding="utf-8") as stream, Progress(self.task.title, len(examples), "questions") as bar:
            if fresh:
                stream.write(json_text({"fingerprint": self.fingerprint, **self.identity}, default=str) + "\n")
            for start in range(0, len(examples), self.batch_size):
                batch = examples[start : start + self.batch_size]
                stream.writelines(json_text(record, ensure_ascii=False) + "\n" for record in self._records(batch))
                stream.flush()
                bar.advance(len(batch))
                if (reason := stop()) is not None:
                    raise Requeue(f"the evaluation stopped early: {reason}", fix="run the same command again to go on")

    def _records(self, batch: Sequence[Example]) -> Iterator[dict[str, Any]]:
        contexts = self.contexts(batch)
        prompts = [self.build_prompt(example, found) for example, found in zip(batch, contexts, strict=True)]
        for example, prompt, text in zip(batch, prompts, self.answer(prompts), strict=True):
            prediction = text.strip()
            yield {
                "id": example.id,
                "question": example.question,
                "answers": list(example.answers),
                "prediction": prediction,
                "scores": self.task.score(prediction, example, self.scoring),
                "prompt": prompt.text,
            }

    def _own_file(self, worker: Worker) -> Path:
        return self.directory / f"{self.task.name}.predictions.{worker.index}-of-{worker.count}.jsonl"

    def _predictions(self) -> dict[str, dict[str, Any]]:
        """Every finished prediction, by id, scored anew (scores depend on the settings of this run)."""
        by_id = {example.id: example for example in self.examples}
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.directory.glob(f"{self.task.name}.predictions.*.jsonl")):
            for record in _whole_lines(path, self.fingerprint):
                example = by_id[record["id"]]
                record["scores"] = self.task.score(record["prediction"], example, self.scoring)
                found[record["id"]] = record
        return found

    def _write_results(self, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        ordered = [done[example.id] for example in self.examples]
        results = {
            "task": self.task.name,
            "examples": len(ordered),
            "metrics": average([record["scores"] for record in ordered], self.task.metrics),
            "protocol": dict(self.identity),
            "fingerprint": self.fingerprint,
        }
        lines = "".join(json_text(record, ensure_ascii=False) + "\n" for record in ordered)
        write_file(self.directory / f"{self.task.name}.examples.jsonl", lines)
        write_file(self.directory / f"{self.task.name}.json", json_text(results, indent=1, default=str) + "\n")
        return results


def _repaired(path: Path) -> bool:
    """Whether this worker's file holds whole lines to go on after; a line cut by a kill is removed first."""
    if not path.exists():
        return False
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
    return whole > 0


def _whole_lines(path: Path, fingerprint: str) -> Iterator[dict[str, Any]]:
    """Records of a predictions file, which another worker may be writing: what is no whole line yet is not there."""
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]
    if not lines:
        return
    head = json.loads(lines[0])
    if head.get("fingerprint") != fingerprint:
        raise ArtifactError(
            f"{path} holds predictions of another model, set or protocol",
            got=head.get("fingerprint"),
            expected=fingerprint,
            fix="give another --eval-output, or remove that file",
        )
    yield from map(json.loads, lines[1:])


def _require_distinct(examples: Sequence[Example]) -> None:
    if not examples:
        raise DataError("the set holds no question", fix="check the file and --eval-limit")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataError(f"two questions have the id {example.id}", fix="remove the copy")
        seen.add(example.id)


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per set and metric."""
    rows = [
        (one["task"], name, round(value, 2), one["examples"])
        for one in results
        for name, value in one["metrics"].items()
    ]
    return render_table(("task", "metric", "value", "questions"), rows)
