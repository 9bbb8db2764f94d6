"""Questions of SQuAD 1.1 to tune on and to ask, by article, and its paragraphs as passages to find.

    python docs/experiments/squad_questions.py train-v1.1.json DIR

Every second article is held out and gives one question, of its middle paragraph. The others give at most ten each
whose answer lies in the beginning of their paragraph, which is then the passage to read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import write_file
from megatron_retro.runtime.strict_json import json_text

BEGINNING = 600  # characters of a passage that an encoder of 192 tokens reads
PER_ARTICLE = 10
Article = Mapping[str, Any]


def asked(articles: Iterable[Article]) -> dict[str, Any]:
    """One question of each article, in SQuAD's own form."""
    chosen = []
    for article in articles:
        paragraph = article["paragraphs"][len(article["paragraphs"]) // 2]
        chosen.append({**article, "paragraphs": [{**paragraph, "qas": paragraph["qas"][:1]}]})
    return {"version": "1.1", "data": chosen}


def taught(articles: Iterable[Article]) -> Iterator[dict[str, Any]]:
    """Questions with the passage that answers them; articles take turns."""
    by_article = [list(_of_article(article)) for article in articles]
    for number in range(PER_ARTICLE):
        yield from (questions[number] for questions in by_article if number < len(questions))


def _of_article(article: Article) -> Iterator[dict[str, Any]]:
    for paragraph in article["paragraphs"]:
        passage = {"title": _title(article), "text": paragraph["context"][:BEGINNING]}
        for question in paragraph["qas"]:
            answer = question["answers"][0]["text"]
            if answer in passage["text"]:
                yield {"question": question["question"].strip(), "answers": [answer], "contexts": [passage]}
                break


def _title(article: Article) -> str:
    return str(article["title"]).replace("_", " ")


def main() -> int:
    """Write questions.json, tune.jsonl and passages.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("squad", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    articles = json.loads(arguments.squad.read_text(encoding="utf-8"))["data"]
    passages = (
        {"title": _title(article), "text": paragraph["context"]}
        for article in articles
        for paragraph in article["paragraphs"]
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_file(arguments.output / "questions.json", json_text(asked(articles[::2])).encode())
    for name, rows in (("tune", taught(articles[1::2])), ("passages", passages)):
        write_file(arguments.output / f"{name}.jsonl", "".join(json_text(row) + "\n" for row in rows).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
