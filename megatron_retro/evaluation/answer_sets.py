"""Sets with short answers: spans of a given text (SQuAD 1.1 and 2.0, Quoref, NewsQA, DROP), questions without a text
(NQ-open, TriviaQA, WebQuestions), and questions of yes or no (BoolQ).

A record of a question without a text may carry retrieved passages as `ctxs` (title and text, best first), the layout of
DPR's published files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.errors import DataError
from megatron_retro.evaluation.examples import Example, need, read_csv, read_json, read_json_lines, read_records

_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()]+?))\)')


def load_squad(path: Path) -> Iterator[Example]:
    """SQuAD 1.1 and 2.0: data -> paragraphs -> qas. Unanswerable questions have no gold answer."""
    for title, context, record in _squad_records(path):
        texts = [str(need(answer, "text", path)) for answer in need(record, "answers", path)]
        impossible = bool(record.get("is_impossible", False))
        if not impossible and not texts:
            raise DataError(f"{path}: question {record.get('id')} has no answer and is not marked impossible")
        answers = () if impossible else _distinct(texts)
        yield Example(
            str(need(record, "id", path)), str(need(record, "question", path)), answers, (Passage(title, context),)
        )


def load_quoref(path: Path) -> Iterator[Example]:
    """SQuAD's layout, but the answers of a question are the spans of ONE answer: they are joined."""
    for title, context, record in _squad_records(path):
        spans = [str(need(answer, "text", path)) for answer in need(record, "answers", path)]
        answer = ", ".join(_distinct(spans))
        yield Example(
            str(need(record, "id", path)), str(need(record, "question", path)), (answer,), (Passage(title, context),)
        )


def _squad_records(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for article in need(read_json(path), "data", path):
        for paragraph in need(article, "paragraphs", path):
            for record in need(paragraph, "qas", path):
                yield str(article.get("title", "")), str(need(paragraph, "context", path)), record


def load_newsqa(path: Path) -> Iterator[Example]:
    """`combined-newsqa-data-v1.json` or `.csv`: character ranges of a story. Test stories when splits are named.

    Gold answers are the consensus and, beside it, every range that a crowdworker gave. Questions whose consensus is
    "bad question" or "no answer" are left out, as in the published tables.
    """
    yield from _newsqa_csv(path) if path.suffix == ".csv" else _newsqa_json(path)


def _newsqa_json(path: Path) -> Iterator[Example]:
    stories = need(read_json(path), "data", path)
    splits = {story.get("type") for story in stories}
    for story in stories:
        if "test" in splits and story.get("type") != "test":
            continue
        text = str(need(story, "text", path))
        for number, record in enumerate(need(story, "questions", path)):
            consensus = need(record, "consensus", path)
            if "s" not in consensus:
                continue
            workers = [span for answer in record.get("answers", ()) for span in answer.get("sourcerAnswers", ())]
            spans = [consensus, *(span for span in workers if "s" in span)]
            answers = _distinct(text[int(span["s"]) : int(span["e"])].strip() for span in spans)
            yield Example(
                f"{need(story, 'storyId', path)}#{number}", str(need(record, "q", path)), answers, (Passage("", text),)
            )


def _newsqa_csv(path: Path) -> Iterator[Example]:
    for number, row in enumerate(read_csv(path)):
        text = need(row, "story_text", path)
        ranges = need(row, "answer_char_ranges", path).replace(",", "|").split("|")
        try:
            consensus = _newsqa_consensus(ranges, need(row, "validated_answers", path))
            bounds = [part.split(":") for part in (consensus, *ranges) if ":" in part]
            answers = _distinct(text[int(start) : int(stop)].strip() for start, stop in bounds)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: the answers of row {number} cannot be read", got=error) from None
        if ":" in consensus:
            yield Example(
                f"{need(row, 'story_id', path)}#{number}", need(row, "question", path), answers, (Passage("", text),)
            )


def _newsqa_consensus(ranges: Sequence[str], validated: str) -> str:
    """As the set's own program derives it for the JSON: what at least half of the validators chose; where none were
    asked, what most crowdworkers marked. Its range, or what stands for a bad question or no answer."""
    if not validated:
        return Counter(ranges).most_common(1)[0][0]
    votes: dict[str, int] = json.loads(validated)
    best = max(votes, key=votes.__getitem__)
    return best if 2 * votes[best] >= sum(votes.values()) else ""


def load_drop(path: Path) -> Iterator[Example]:
    """DROP: an answer is a number, a date or spans (joined); the validated answers count as gold too."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} is not DROP's file", got=type(document).__name__, expected="passages by id")
    for passage_id, passage in document.items():
        text = str(need(passage, "passage", path))
        for number, record in enumerate(need(passage, "qa_pairs", path)):
            given = [need(record, "answer", path), *record.get("validated_answers", ())]
            answers = _distinct(_drop_answer(answer) for answer in given)
            name = str(record.get("query_id", f"{passage_id}#{number}"))
            yield Example(name, str(need(record, "question", path)), answers, (Passage("", text),))


def _drop_answer(answer: dict[str, Any]) -> str:
    if answer.get("number") not in (None, ""):
        return str(answer["number"])
    if answer.get("spans"):
        return ", ".join(answer["spans"])
    date = answer.get("date") or {}
    return " ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


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
