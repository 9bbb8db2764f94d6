"""Each set from a small file in the layout in which it was published."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.errors import DataError
from megatron_retro.evaluation.examples import Example
from megatron_retro.evaluation.tasks import find_task


def load(task: str, path: Path, content: Any) -> list[Example]:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    else:
        path.write_text(json.dumps(content))
    return list(find_task(task).load(path))


def squad(*questions: dict[str, Any]) -> dict[str, Any]:
    paragraph = {"context": "Paris is the capital of France.", "qas": list(questions)}
    return {"version": "v2.0", "data": [{"title": "France", "paragraphs": [paragraph]}]}


def test_squad(tmp_path: Path) -> None:
    given = {"id": "1", "question": "Capital?", "answers": [{"text": "Paris", "answer_start": 0}] * 2}
    none = {"id": "2", "question": "King?", "answers": [], "is_impossible": True, "plausible_answers": []}
    first, second = load("squad2", tmp_path / "s.json", squad(given, none))
    assert first.answers == ("Paris",) and first.contexts[0].title == "France"
    assert second.answers == ()
    with pytest.raises(DataError, match="not marked impossible"):
        load("squad1", tmp_path / "s.json", squad({"id": "3", "question": "?", "answers": []}))


def test_quoref(tmp_path: Path) -> None:
    spans = [{"text": "Paris", "answer_start": 0}, {"text": "France", "answer_start": 24}]
    (found,) = load("quoref", tmp_path / "q.json", squad({"id": "1", "question": "Which?", "answers": spans}))
    assert found.answers == ("Paris, France",)


def test_newsqa(tmp_path: Path) -> None:
    text = "Tingle made the words."
    questions = [
        {
            "q": "Who?",
            "consensus": {"s": 0, "e": 7},
            "answers": [{"sourcerAnswers": [{"s": 0, "e": 11}, {"noAnswer": True}]}],
        },
        {"q": "Bad?", "consensus": {"badQuestion": True}, "answers": []},
    ]
    stories = [
        {"storyId": "./a.story", "type": "test", "text": text, "questions": questions},
        {"storyId": "./b.story", "type": "train", "text": text, "questions": questions},
    ]
    (found,) = load("newsqa", tmp_path / "n.json", {"version": "1", "data": stories})
    assert found.answers == ("Tingle", "Tingle made")


@pytest.mark.parametrize(
    ("ranges", "validated", "consensus"),
    [
        ("0:6|None|0:6,12:21", "", (0, 6)),
        ("0:6|12:21|None", '{"12:21":2,"none":1}', (12, 21)),
        ("0:6|12:21|None", '{"12:21":1,"none":2}', None),
        ("0:6|12:21|None", '{"bad_question":2,"0:6":1}', None),
        ("0:6|12:21|12:15", '{"0:6":1,"12:21":1,"none":1}', None),
        ("None|None|0:6", "", None),
    ],
)
def test_newsqa_has_the_same_questions_as_json_and_as_csv(
    ranges: str, validated: str, consensus: tuple[int, int] | None, tmp_path: Path
) -> None:
    """The JSON's consensus is what the set's program derives; in all cases some workers call the question bad."""
    text = "Tingle made the words."
    workers = [
        [{"noAnswer": True} if one == "None" else dict(zip("se", map(int, one.split(":")), strict=True))]
        for one in ranges.replace(",", "|").split("|")
    ]
    question = {
        "q": "Who?",
        "consensus": {"noAnswer": True} if consensus is None else dict(zip("se", consensus, strict=True)),
        "answers": [{"sourcerAnswers": spans} for spans in workers],
    }
    story = {"storyId": "a", "type": "test", "text": text, "questions": [question]}
    row = {"story_id": "a", "question": "Who?", "answer_char_ranges": ranges, "validated_answers": validated}
    in_csv = load("newsqa", tmp_path / "n.csv", [{**row, "is_question_bad": "0.25", "story_text": text}])
    assert in_csv == load("newsqa", tmp_path / "n.json", {"version": "1", "data": [story]})
    assert len(in_csv) == (consensus is not None)


def test_drop(tmp_path: Path) -> None:
    def answer(**given: Any) -> dict[str, Any]:
        return {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": [], **given}

    pairs = [
        {
            "query_id": "n",
            "question": "How many?",
            "answer": answer(number="3"),
            "validated_answers": [answer(number="4")],
        },
        {"query_id": "d", "question": "When?", "answer": answer(date={"day": "2", "month": "May", "year": "1990"})},
        {"query_id": "s", "question": "Who?", "answer": answer(spans=["A", "B"])},
    ]
    found = load("drop", tmp_path / "d.json", {"p1": {"passage": "text", "qa_pairs": pairs, "wiki_url": ""}})
    assert [one.answers for one in found] == [("3", "4"), ("2 May 1990",), ("A, B",)]


def test_open_questions(tmp_path: Path) -> None:
    plain = load("nq", tmp_path / "n.jsonl", [{"question": "who\u2028?", "answer": ["x", "y"]}])
    assert plain[0].answers == ("x", "y") and plain[0].question == "who\u2028?"
    contexts = [{"title": "T", "text": "passage"}]
    (with_contexts,) = load("nq", tmp_path / "n.json", [{"question": "w", "answers": ["x"], "ctxs": contexts}])
    assert with_contexts.contexts[0].rendered() == "title: T, source: passage"
    official = {"Data": [{"Question": "q", "QuestionId": "t1", "Answer": {"Value": "V", "Aliases": ["V", "W"]}}]}
    (trivia,) = load("triviaqa", tmp_path / "t.json", official)
    assert trivia.answers == ("V", "W") and trivia.id == "t1"
    target = r'(list (description "Jazmyn Bieber") (description Bahamas) (description "the \"X\""))'
    (original,) = load("webquestions", tmp_path / "w.json", [{"url": "u", "utterance": "w", "targetValue": target}])
    assert original.answers == ("Jazmyn Bieber", "Bahamas", 'the "X"')
    (second,) = load("webquestions", tmp_path / "w2.json", [{"qId": "1", "qText": "w", "answers": ["a"]}])
    assert second.answers == ("a",)


def test_bool_q(tmp_path: Path) -> None:
    record = {"question": "is it", "title": "T", "answer": True, "passage": "p"}
    choice = {"query": "Passage: p\nQuestion: is it?", "choices": ["no", "yes"], "gold": 0}
    first, second = load("boolq", tmp_path / "b.jsonl", [record, choice])
    assert (first.answers, second.answers) == (("True",), ("False",))
    assert (second.question, second.contexts[0].text) == ("is it?", "p")


def test_narrative_qa(tmp_path: Path) -> None:
    row = {"document_id": "d", "question": "Who?", "answer1": "A", "answer2": "B"}
    with pytest.raises(DataError, match=r"summaries.csv"):
        load("narrativeqa", tmp_path / "qaps.csv", [{**row, "set": "test"}])
    load_rows = [{"document_id": "d", "set": "test", "summary": "A long\nstory, in two lines"}]
    with (tmp_path / "summaries.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(load_rows[0]))
        writer.writeheader()
        writer.writerows(load_rows)
    (found,) = load("narrativeqa", tmp_path / "qaps.csv", [{**row, "set": "test"}, {**row, "set": "train"}])
    assert found.answers == ("A", "B") and found.contexts[0].text == "A long\nstory, in two lines"


def test_qasper(tmp_path: Path) -> None:
    blank = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": ""}
    forms = [
        {**blank, "extractive_spans": ["a", "b"]},
        {**blank, "free_form_answer": "free"},
        {**blank, "yes_no": False},
        {**blank, "unanswerable": True},
    ]
    paper = {
        "title": "P",
        "abstract": "short",
        "full_text": [{"section_name": "Intro", "paragraphs": ["one", "two"]}],
        "qas": [{"question": "?", "question_id": "q", "answers": [{"answer": form} for form in forms]}],
    }
    (found,) = load("qasper", tmp_path / "q.json", {"id": paper})
    assert found.answers == ("a, b", "free", "No", "Unanswerable")
    assert [one.title for one in found.contexts] == ["P", "P: Intro"]


def test_quality(tmp_path: Path) -> None:
    question = {"question": "?", "options": ["w", "x", "y", "z"], "gold_label": 3, "question_unique_id": "u"}
    (found,) = load("quality", tmp_path / "q.jsonl", [{"article": "long", "title": "T", "questions": [question]}])
    assert found.answers == ("y",)
    with pytest.raises(DataError, match="gold_label"):
        load("quality", tmp_path / "q.jsonl", [{"article": "l", "questions": [{**question, "gold_label": 0}]}])


def test_doc2dial(tmp_path: Path) -> None:
    document = {
        "title": "D",
        "doc_text": "Pay at the office. Open daily.",
        "spans": {"1": {"text_sp": "Pay at the office. "}},
    }
    (tmp_path / "doc2dial_doc.json").write_text(json.dumps({"doc_data": {"dmv": {"doc": document}}}))
    turns = [
        {"turn_id": 1, "role": "user", "utterance": "Hi", "references": []},
        {"turn_id": 2, "role": "agent", "utterance": "Hello", "references": []},
        {"turn_id": 3, "role": "user", "utterance": "Where?", "references": []},
        {
            "turn_id": 4,
            "role": "agent",
            "utterance": "At the office",
            "references": [{"sp_id": "1", "label": "solution"}],
        },
    ]
    talks = {"dial_data": {"dmv": {"doc": [{"dial_id": "x", "turns": turns}]}}}
    (found,) = load("doc2dial", tmp_path / "dial.json", talks)
    assert found.question == "Where?" and found.answers == ("At the office",)
    assert found.history == (("User", "Hi"), ("Assistant", "Hello"))
    assert found.contexts[0].text == "Pay at the office."


def test_summaries(tmp_path: Path) -> None:
    meeting = {
        "meeting_transcripts": [{"speaker": "A", "content": "hello"}],
        "general_query_list": [{"query": "Summarize", "answer": "greeting"}],
        "specific_query_list": [{"query": "What did A say?", "answer": "hello"}],
    }
    assert [one.answers for one in load("qmsum", tmp_path / "m.jsonl", [meeting])] == [("greeting",), ("hello",)]
    sections = [
        {"section_title": "S", "paragraphs": ["one"], "subsections": [{"section_title": "T", "paragraphs": ["two"]}]}
    ]
    report = {
        "id": "r",
        "title": "R",
        "report": sections,
        "highlight": [{"section_title": "H", "paragraphs": ["gist"]}],
    }
    (found,) = load("govreport", tmp_path / "g.json", report)
    assert found.contexts[0].text == "S\none\nT\ntwo" and found.answers == ("H\ngist",)
    crs = {"id": "c", "title": "C", "reports": sections[0], "summary": ["first", "second"]}
    assert load("govreport", tmp_path / "c.json", crs)[0].answers == ("first\nsecond",)
    (episode,) = load(
        "summscreen", tmp_path / "s.jsonl", [{"Transcript": ["A: hi", "B: ho"], "Recap": ["They greet."]}]
    )
    assert episode.contexts[0].text == "A: hi\nB: ho" and episode.answers == ("They greet.",)


def test_scrolls(tmp_path: Path) -> None:
    records = [
        {"id": "1", "input": "What?\n\nThe text.", "output": "a"},
        {"id": "1", "input": "What?\n\nThe text.", "output": "b"},
    ]
    for task in ("qmsum", "qasper"):
        (found,) = load(task, tmp_path / "x.jsonl", records)
        assert (found.question, found.answers, found.contexts[0].text) == ("What?", ("a", "b"), "The text.")
    (whole,) = load("govreport", tmp_path / "x.jsonl", records)
    assert whole.contexts[0].text == "What?\n\nThe text."


@pytest.mark.parametrize("task", ["nq", "squad1", "newsqa", "drop", "quality", "qasper", "webquestions", "qmsum"])
def test_what_is_missing_is_named(task: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    with pytest.raises(DataError, match="cannot read"):
        list(find_task(task).load(path))
    path.write_text('{"data": [')
    with pytest.raises(DataError, match="not JSON"):
        list(find_task(task).load(path))
    path.write_text('[{"unexpected": 1}]')
    with pytest.raises(DataError, match=r"has no|object|is not DROP"):
        list(find_task(task).load(path))
