"""Sets about long texts: questions (NarrativeQA, Qasper, QuALITY), talks (doc2dial), and summaries (QMSum, GovReport,
SummScreenFD); those of SCROLLS in their own layout or in SCROLLS'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.errors import DataError
from megatron_retro.evaluation.examples import Example, need, read_csv, read_json, read_json_lines

UNANSWERABLE = "Unanswerable"
SUMMARIZE_REPORT = "Summarize the report."
SUMMARIZE_EPISODE = "Summarize the episode."


def load_narrative_qa(path: Path) -> Iterator[Example]:
    """NarrativeQA: `qaps.csv` with `summaries.csv` beside it (or below `third_party/wikipedia`); the test rows."""
    summaries = {row["document_id"]: row["summary"] for row in read_csv(_summaries_beside(path))}
    rows = read_csv(path)
    splits = {row.get("set") for row in rows}
    for number, row in enumerate(rows):
        if "test" in splits and row.get("set") != "test":
            continue
        story = need(row, "document_id", path)
        if story not in summaries:
            raise DataError(f"{path}: no summary of document {story}", fix="give the summaries.csv of the same release")
        golds = (need(row, "answer1", path), need(row, "answer2", path))
        yield Example(f"{story}#{number}", need(row, "question", path), golds, (Passage("", summaries[story]),))


def _summaries_beside(path: Path) -> Path:
    for candidate in (path.with_name("summaries.csv"), path.parent / "third_party" / "wikipedia" / "summaries.csv"):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{path} needs the summaries of its stories",
        expected=f"summaries.csv beside it, or {path.parent / 'third_party/wikipedia/summaries.csv'}",
        fix="copy it from the same release of NarrativeQA",
    )


def load_qasper(path: Path) -> Iterator[Example]:
    """Qasper: papers by id; an answer is spans (joined), free text, yes or no, or Unanswerable; or SCROLLS' layout."""
    if path.suffix == ".jsonl":
        yield from load_scrolls(path)
        return
    for paper_id, paper in need_mapping(read_json(path), path).items():
        contexts = tuple(_qasper_passages(paper, path))
        for record in need(paper, "qas", path):
            golds = [_qasper_answer(need(one, "answer", path)) for one in need(record, "answers", path)]
            name = str(record.get("question_id", paper_id))
            yield Example(name, str(need(record, "question", path)), tuple(dict.fromkeys(golds)), contexts)


def _qasper_passages(paper: Mapping[str, Any], path: Path) -> Iterator[Passage]:
    title = str(paper.get("title", ""))
    if paper.get("abstract"):
        yield Passage(title, str(paper["abstract"]))
    for section in need(paper, "full_text", path):
        text = "\n".join(section.get("paragraphs", ()))
        if text:
            yield Passage(f"{title}: {section.get('section_name') or ''}".rstrip(": "), text)


def _qasper_answer(answer: Mapping[str, Any]) -> str:
    if answer.get("unanswerable"):
        return UNANSWERABLE
    if answer.get("extractive_spans"):
        return ", ".join(answer["extractive_spans"])
    if answer.get("free_form_answer"):
        return str(answer["free_form_answer"])
    if answer.get("yes_no") is None:
        raise DataError("a Qasper answer is of no known form", got=dict(answer))
    return "Yes" if answer["yes_no"] else "No"


def load_quality(path: Path) -> Iterator[Example]:
    """QuALITY: one article per line with multiple-choice questions; `gold_label` counts from 1."""
    for article in read_json_lines(path):
        context = Passage(str(article.get("title", "")), str(need(article, "article", path)))
        for number, record in enumerate(need(article, "questions", path)):
            options = tuple(map(str, need(record, "options", path)))
            label = int(need(record, "gold_label", path))
            if not 1 <= label <= len(options):
                raise DataError(f"{path}: gold_label is no option", got=label, expected=f"1 to {len(options)}")
            name = str(record.get("question_unique_id", f"{article.get('article_id')}#{number}"))
            yield Example(name, str(need(record, "question", path)), (options[label - 1],), (context,), options)


def load_doc2dial(path: Path) -> Iterator[Example]:
    """doc2dial: `dial_data` (domain -> document -> talks) with `doc2dial_doc.json` beside it.

    Each of the agent's turns that refers to the document is a question; what was said before is its history. The
    text that it refers to is the first context, the rest of the document the second.
    """
    documents = _doc2dial_documents(path)
    for talks_by_document in need(read_json(path), "dial_data", path).values():
        for document_id, talks in talks_by_document.items():
            if document_id not in documents:
                raise DataError(f"{path}: document {document_id} is not in doc2dial_doc.json")
            for talk in talks:
                yield from _doc2dial_turns(talk, documents[document_id], path)


def _doc2dial_documents(path: Path) -> dict[str, dict[str, Any]]:
    beside = path.with_name("doc2dial_doc.json")
    if not beside.is_file():
        raise DataError(f"{path} needs the documents of its talks", expected=str(beside), fix="copy it from doc2dial")
    by_domain = need(read_json(beside), "doc_data", beside)
    return {name: document for documents in by_domain.values() for name, document in documents.items()}


def _doc2dial_turns(talk: Mapping[str, Any], document: Mapping[str, Any], path: Path) -> Iterator[Example]:
    history: list[tuple[str, str]] = []
    title, text = str(document.get("title", "")), str(need(document, "doc_text", path))
    for turn in need(talk, "turns", path):
        role, said = str(need(turn, "role", path)), str(need(turn, "utterance", path))
        if role == "agent" and turn.get("references") and history and history[-1][0] == "User":
            contexts = (Passage(title, _referred_text(turn, document)), Passage(title, text))
            name = f"{talk.get('dial_id')}#{turn.get('turn_id')}"
            yield Example(name, history[-1][1], (said,), contexts, history=tuple(history[:-1]))
        history.append(("User" if role == "user" else "Assistant", said))


def _referred_text(turn: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    spans = document.get("spans", {})
    names = [need(one, "sp_id", "references") for one in turn["references"]]
    return " ".join(str(need(spans[name], "text_sp", "spans")).strip() for name in names if name in spans)


def load_scrolls(path: Path) -> Iterator[Example]:
    """SCROLLS' layout of any of its sets: `input` (question, blank line, text) and `output`; same id = more golds."""
    golds: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for number, record in enumerate(read_json_lines(path)):
        name = str(record.get("id", number))
        texts[name] = str(need(record, "input", path))
        golds.setdefault(name, []).append(str(need(record, "output", path)))
    for name, text in texts.items():
        question, _, document = text.partition("\n\n")
        yield Example(name, question.strip(), tuple(golds[name]), (Passage("", document),))


def need_mapping(document: object, path: Path) -> Mapping[str, Any]:
    """The document, if it is an object."""
    if not isinstance(document, Mapping):
        raise DataError(f"{path} holds no object", got=type(document).__name__, expected="records by id")
    return document


def load_qmsum(path: Path) -> Iterator[Example]:
    """QMSum: one meeting per line with general and specific queries."""
    if _is_scrolls(path):
        yield from load_scrolls(path)
        return
    for number, meeting in enumerate(read_json_lines(path)):
        turns = need(meeting, "meeting_transcripts", path)
        text = "\n".join(f"{need(turn, 'speaker', path)}: {need(turn, 'content', path)}" for turn in turns)
        queries = [*meeting.get("general_query_list", ()), *meeting.get("specific_query_list", ())]
        for place, query in enumerate(queries):
            golds = (str(need(query, "answer", path)),)
            yield Example(f"{number}#{place}", str(need(query, "query", path)), golds, (Passage("", text),))


def load_gov_report(path: Path) -> Iterator[Example]:
    """GovReport: GAO files (`report`, `highlight`), CRS files (`reports`, `summary`), or SCROLLS' layout."""
    if _is_scrolls(path):
        yield from _scrolls_without_question(path, SUMMARIZE_REPORT)
        return
    document = read_json(path)
    for number, record in enumerate(document if isinstance(document, list) else [document]):
        body = record["reports"] if "reports" in record else need(record, "report", path)
        summary = record["highlight"] if "highlight" in record else need(record, "summary", path)
        title = str(record.get("title", ""))
        gold = "\n".join(_paragraphs(summary))
        context = Passage(title, "\n".join(_paragraphs(body)))
        yield Example(str(record.get("id", number)), SUMMARIZE_REPORT, (gold,), (context,))


def load_summ_screen(path: Path) -> Iterator[Example]:
    """SummScreenFD: `Transcript` and `Recap` as lists of lines, one episode per line, or SCROLLS' layout."""
    if _is_scrolls(path):
        yield from _scrolls_without_question(path, SUMMARIZE_EPISODE)
        return
    for number, record in enumerate(read_json_lines(path)):
        fields = {key.strip().lower(): value for key, value in record.items()}
        gold = "\n".join(_lines(need(fields, "recap", path)))
        title = str(fields.get("episode title", fields.get("show title", "")))
        context = Passage(title, "\n".join(_lines(need(fields, "transcript", path))))
        yield Example(str(fields.get("filename", number)), SUMMARIZE_EPISODE, (gold,), (context,))


def _scrolls_without_question(path: Path, request: str) -> Iterator[Example]:
    for example in load_scrolls(path):
        whole = "\n\n".join(part for part in (example.question, example.contexts[0].text) if part)
        yield Example(example.id, request, example.answers, (Passage("", whole),))


def _is_scrolls(path: Path) -> bool:
    if path.suffix != ".jsonl":
        return False
    first = next(read_json_lines(path), None)
    return first is not None and "input" in first and "output" in first


def _paragraphs(part: Any) -> Iterator[str]:
    """The text of nested sections, in order, titles included."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        if part.get("section_title"):
            yield str(part["section_title"])
        yield from _paragraphs(part.get("paragraphs", ()))
        yield from _paragraphs(part.get("subsections", ()))
    elif isinstance(part, Sequence):
        for one in part:
            yield from _paragraphs(one)


def _lines(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else [str(line) for line in value]
