"""Sets of questions without a text: NQ-open, TriviaQA, WebQuestions; and with one: BoolQ.

A record may carry retrieved passages as `ctxs` (title and text, best first), the layout of DPR's published files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.errors import DataError
from megatron_retro.evaluation.examples import Example, need, read_json, read_json_lines, read_records

_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()]+?))\)')


def load_open_questions(path: Path) -> Iterator[Example]:
    """NQ-open: `question`, `answer` (a list), as JSON lines or as DPR's JSON list with `answers` and `ctxs`."""
    yield from _open_records(read_records(path), path)


def _open_records(records: list[dict[str, Any]], path: Path) -> Iterator[Example]:
    for number, record in enumerate(records):
        answers = record["answers"] if "answers" in record else need(record, "answer", path)
        golds = (answers,) if isinstance(answers, str) else tuple(map(str, answers))
        name = str(record.get("id", number))
        yield Example(name, str(need(record, "question", path)), golds, given_contexts(record))


def given_contexts(record: Mapping[str, Any]) -> tuple[Passage, ...]:
    """The passages that DPR's layout carries."""
    return tuple(Passage(str(one.get("title", "")), str(need(one, "text", "ctxs"))) for one in record.get("ctxs", ()))


def load_trivia_qa(path: Path) -> Iterator[Example]:
    """TriviaQA's own JSON (`Data`, aliases of the answer), or questions with answers as NQ-open has them."""
    if path.suffix == ".jsonl":
        yield from load_open_questions(path)
        return
    document = read_json(path)
    if isinstance(document, list):
        yield from _open_records(document, path)
        return
    for record in need(document, "Data", path):
        answer = need(record, "Answer", path)
        golds = [need(answer, "Value", path), *answer.get("Aliases", ()), *answer.get("HumanAnswers", ())]
        name, question = need(record, "QuestionId", path), need(record, "Question", path)
        yield Example(str(name), str(question), tuple(dict.fromkeys(map(str, golds))))


def load_web_questions(path: Path) -> Iterator[Example]:
    """WebQuestions: `utterance` with `targetValue` (the original), or `qText` with `answers`."""
    for number, record in enumerate(read_records(path)):
        if "utterance" in record:
            found = _DESCRIPTION.findall(str(need(record, "targetValue", path)))
            golds = tuple(quoted.replace('\\"', '"') or bare for quoted, bare in found)
            yield Example(str(record.get("url", number)), str(record["utterance"]), golds)
            continue
        answers = tuple(map(str, need(record, "answers", path)))
        yield Example(str(record.get("qId", number)), str(need(record, "qText", path)), answers)


def load_bool_q(path: Path) -> Iterator[Example]:
    """BoolQ: `question`, `passage`, `title` and `answer` (true or false); or `query`, `choices` and `gold`."""
    for number, record in enumerate(read_json_lines(path)):
        if "query" in record:
            yield _bool_q_choice(number, record, path)
            continue
        answer = need(record, "answer", path)
        if not isinstance(answer, bool):
            raise DataError(f"{path}: record {number} has no truth value", got=answer, expected="true or false")
        context = Passage(str(record.get("title", "")), str(need(record, "passage", path)))
        yield Example(str(number), str(need(record, "question", path)), (str(answer),), (context,))


def _bool_q_choice(number: int, record: Mapping[str, Any], path: Path) -> Example:
    """A record of the multiple-choice edition: passage and question are one text, the choices are no and yes."""
    passage, _, question = str(record["query"]).rpartition("\nQuestion:")
    choice = str(need(record, "choices", path)[int(need(record, "gold", path))])
    context = Passage("", passage.removeprefix("Passage:").strip())
    return Example(str(number), question.strip(), ("True" if choice == "yes" else "False",), (context,))
