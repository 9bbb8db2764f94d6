"""Contexts for questions: those of the set, or the best passages by BM25 or a dual encoder.

Without a collection of passages, a question's own long text is cut into passages and these are ranked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.errors import DataError
from megatron_retro.evaluation.examples import Example, need, read_json_lines
from megatron_retro.runtime.environment import require

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
_WORD = re.compile(r"\w+")
PASSAGE_WORDS = 100


class PassageRanker:
    """Ranks a fixed collection for a question."""

    def best(self, questions: Sequence[str], count: int) -> list[list[int]]:
        """For each question the numbers of the best passages."""
        raise NotImplementedError


class BM25(PassageRanker):
    """Okapi BM25 (k1 0.9, b 0.4: Anserini's choice) over words in lower case, by bm25s."""

    def __init__(self, texts: Sequence[str], k1: float = 0.9, b: float = 0.4) -> None:
        require("bm25s", "retrieval of contexts by BM25")
        import bm25s

        documents = [words(text) for text in texts]
        self.size = len(documents)
        self._index = bm25s.BM25(k1=k1, b=b, dtype="float64") if any(documents) else None
        if self._index is not None:
            self._index.index(documents, show_progress=False)

    def best(self, questions: Sequence[str], count: int) -> list[list[int]]:
        """Ties go to the earlier passage; passages without any word of the question come last."""
        return [np.argsort(-self._scores(question), kind="stable")[:count].tolist() for question in questions]

    def _scores(self, question: str) -> NDArray[np.float64]:
        if self._index is None:
            return np.zeros(self.size)
        scores: NDArray[np.float64] = self._index.get_scores_from_ids(self._index.get_tokens_ids(words(question)))
        return scores


class DenseRanker(PassageRanker):
    """Inner products of question and passage vectors: exact, by faiss."""

    def __init__(self, texts: Sequence[str], embed_passages: Embed, embed_questions: Embed) -> None:
        require("faiss", "dense retrieval of contexts")
        import faiss

        vectors = embed_passages(texts)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)
        self._embed = embed_questions

    def best(self, questions: Sequence[str], count: int) -> list[list[int]]:
        found = self._index.search(self._embed(questions), min(count, self._index.ntotal))[1]
        ranked: list[list[int]] = found.tolist()
        return ranked


def words(text: str) -> list[str]:
    """Words in lower case."""
    return _WORD.findall(text.lower())


def bert_embedder(folder: Path, batch_size: int = 32, max_length: int = 256) -> Embed:
    """First-token vectors of a local BERT-family encoder, as DPR and Dragon use them."""
    require("transformers", "dense retrieval of contexts")
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not folder.is_dir():
        raise DataError(f"there is no encoder folder {folder}", fix="give a local folder with config.json and weights")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        rows = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            inputs = tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            with torch.inference_mode():
                rows.append(model(**inputs).last_hidden_state[:, 0].float().numpy())
        return np.ascontiguousarray(np.concatenate(rows), np.float32)

    return embed


@dataclass(frozen=True)
class GivenContexts:
    """The set's own."""

    def __call__(self, examples: Sequence[Example]) -> list[tuple[Passage, ...]]:
        return [example.contexts for example in examples]


@dataclass(frozen=True)
class CollectionContexts:
    """The best of one collection, for every question."""

    passages: Sequence[Passage]
    ranker: PassageRanker
    count: int

    def __call__(self, examples: Sequence[Example]) -> list[tuple[Passage, ...]]:
        ranked = self.ranker.best([example.question for example in examples], self.count)
        return [tuple(self.passages[number] for number in numbers) for numbers in ranked]


@dataclass(frozen=True)
class OwnTextContexts:
    """The best passages of each question's own text, cut into pieces of about `PASSAGE_WORDS` words."""

    build_ranker: Callable[[Sequence[str]], PassageRanker]
    count: int

    def __call__(self, examples: Sequence[Example]) -> list[tuple[Passage, ...]]:
        return [self._ranked(example) for example in examples]

    def _ranked(self, example: Example) -> tuple[Passage, ...]:
        pieces = [piece for passage in example.contexts for piece in cut_in_passages(passage)]
        if not pieces:
            return ()
        ranker = self.build_ranker([searchable(piece) for piece in pieces])
        return tuple(pieces[number] for number in ranker.best([example.question], self.count)[0])


def cut_in_passages(passage: Passage, size: int = PASSAGE_WORDS) -> Iterator[Passage]:
    """Pieces of `size` words, each under the passage's title."""
    pieces = passage.text.split()
    for start in range(0, len(pieces), size):
        yield Passage(passage.title, " ".join(pieces[start : start + size]))


def searchable(passage: Passage) -> str:
    """What is compared with a question."""
    return f"{passage.title} {passage.text}".strip()


def read_passages(path: Path) -> list[Passage]:
    """A collection: JSON lines of `text` and, if there is one, `title`."""
    found = [Passage(str(record.get("title", "")), str(need(record, "text", path))) for record in read_json_lines(path)]
    if not found:
        raise DataError(f"{path} holds no passage", expected='JSON lines of {"title", "text"}')
    return found
