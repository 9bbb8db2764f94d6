"""Sets of long texts with summaries: QMSum, GovReport, SummScreenFD; each in its own layout or in SCROLLS'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.evaluation.document_sets import load_scrolls
from megatron_retro.evaluation.examples import Example, need, read_json, read_json_lines

SUMMARIZE_REPORT = "Summarize the report."
SUMMARIZE_EPISODE = "Summarize the episode."


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
