"""Prompts as published; runs that are killed, shared and resumed; contexts by BM25 and by vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import ArtifactError, DataError
from megatron_retro.evaluation.contexts import (
    BM25,
    CollectionContexts,
    GivenContexts,
    OwnTextContexts,
    bert_embedder,
    read_passages,
    words,
)
from megatron_retro.evaluation.examples import Example
from megatron_retro.evaluation.prompts import Form, Prompt, build_prompt
from megatron_retro.evaluation.suite import Evaluation
from megatron_retro.evaluation.tasks import Scoring, find_task
from megatron_retro.runtime.launch import Worker

TOKENIZER = ByteTokenizer()


def prompt_of(example: Example, form: Form, budget: int = 4000, **changes: int) -> Prompt:
    settings = {"num_contexts": 5, "encoder_contexts": 2, **changes}
    return build_prompt(
        example, form, example.contexts, budget=budget, encode=TOKENIZER.encode, decode=TOKENIZER.decode, **settings
    )


def test_published_prompt() -> None:
    contexts = tuple(Passage(f"T{number}", f"text {number}") for number in range(7))
    prompt = prompt_of(Example("1", "who?", ("x",), contexts), Form.SHORT)
    assert prompt.text == (
        "System: This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions based on the context. The assistant should also indicate "
        "when the answer cannot be found in the context.\n\n"
        "title: T0, source: text 0\n\ntitle: T1, source: text 1\n\ntitle: T2, source: text 2\n\n"
        "title: T3, source: text 3\n\ntitle: T4, source: text 4\n\n"
        "User: Answer the following question with a short span. who?\n\nAssistant: The answer is"
    )
    assert prompt.passages == ("title: T0, source: text 0", "title: T1, source: text 1")
    talk = Example("2", "and then?", ("x",), history=(("User", "hi"), ("Assistant", "hello")))
    assert prompt_of(talk, Form.TALK).text.endswith("User: hi\n\nAssistant: hello\n\nUser: and then?\n\nAssistant:")
    choice = Example("3", "which?", ("b",), options=("a", "b"))
    assert "which?\nChoose one based on the following options: (A) a (B) b" in prompt_of(choice, Form.CHOICE).text


@pytest.mark.parametrize("budget", [400, 460, 480, 500, 900])
def test_contexts_are_cut_to_the_budget(budget: int) -> None:
    contexts = (Passage("First", "é" * 60), Passage("Second", "word " * 100))
    prompt = prompt_of(Example("1", "who?", ("x",), contexts), Form.SHORT, budget)
    assert len(TOKENIZER.encode(prompt.text)) <= budget
    assert "�" not in prompt.text and "who?" in prompt.text
    if budget >= 500:
        assert "First" in prompt.text


class Model:
    """Answers with the last word of the question; may be killed after some answers."""

    def __init__(self, answers: int = 10**9) -> None:
        self.left, self.asked = answers, 0

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        if self.left < len(prompts):
            raise KeyboardInterrupt
        self.left -= len(prompts)
        self.asked += len(prompts)
        return [prompt.text.split("?")[-2].split()[-1] + "\u2028" for prompt in prompts]


def evaluation(directory: Path, model: Model, **changes: Any) -> Evaluation:
    examples = [Example(str(number), f"is it w{number}?", (f"w{number % 7}",)) for number in range(23)]
    made = Evaluation(
        task=find_task("nq"),
        examples=examples,
        contexts=GivenContexts(),
        build_prompt=lambda example, contexts: prompt_of(example, Form.SHORT),
        answer=model,
        scoring=Scoring(),
        identity={"model": "m"},
        directory=directory,
        batch_size=4,
    )
    return replace(made, **changes)


def test_killed_and_shared_runs_give_the_same_results(tmp_path: Path) -> None:
    whole = evaluation(tmp_path / "whole", Model()).run(Worker(0, 1))
    assert whole is not None and whole["metrics"]["em"] == pytest.approx(100 * 7 / 23)
    shared = tmp_path / "shared"
    with pytest.raises(KeyboardInterrupt):
        evaluation(shared, Model(answers=5)).run(Worker(0, 2))
    with (shared / "nq.predictions.0-of-2.jsonl").open("ab") as stream:
        stream.write(b'{"id": "9", "predic')  # the kill fell into a line
    second = Model()
    assert evaluation(shared, second).run(Worker(1, 3)) is None
    rest = Model()
    for number in range(3):
        found = evaluation(shared, rest).run(Worker(number, 3))
    assert found is not None
    assert found["metrics"] == whole["metrics"] and second.asked + rest.asked == 23 - 4
    lines = [(tmp_path / name / "nq.examples.jsonl").read_text() for name in ("whole", "shared")]
    assert lines[0] == lines[1]
    again = Model()
    assert evaluation(shared, again).run(Worker(0, 1)) == found and again.asked == 0


def test_a_worker_that_is_done_leaves_the_files_of_others_alone(tmp_path: Path) -> None:
    """Another worker may be in the middle of a line, or may not have written its first."""
    for name, content in (("1-of-3", b""), ("2-of-3", b'{"fingerprint": "')):
        (tmp_path / f"nq.predictions.{name}.jsonl").write_bytes(content)
        assert evaluation(tmp_path, Model()).run(Worker(0, 3)) is None
        assert (tmp_path / f"nq.predictions.{name}.jsonl").read_bytes() == content
    for number in (1, 2):
        found = evaluation(tmp_path, Model()).run(Worker(number, 3))
    assert found is not None and found["examples"] == 23


def test_other_predictions_are_refused(tmp_path: Path) -> None:
    evaluation(tmp_path, Model()).run(Worker(0, 1))
    with pytest.raises(ArtifactError, match="another model"):
        evaluation(tmp_path, Model(), identity={"model": "other"}).run(Worker(0, 1))
    rescored = evaluation(tmp_path, Model(0), scoring=Scoring(first_answer=True)).run(Worker(0, 1))
    assert rescored is not None
    double = [Example("1", "is it?", ("x",))] * 2
    with pytest.raises(DataError, match="two questions"):
        evaluation(tmp_path, Model(), examples=double).run(Worker(0, 1))
    with pytest.raises(DataError, match="no question"):
        evaluation(tmp_path, Model(), examples=[]).run(Worker(0, 1))


def test_bm25_is_the_formula() -> None:
    texts = ["the cat sat", "the dog sat on the dog", "a bird", "cat and dog and cat"]
    ranker, question = BM25(texts), "cat dog"
    lengths = [len(words(text)) for text in texts]

    def score(text: str) -> float:
        total = 0.0
        for word in question.split():
            holding = sum(word in words(other) for other in texts)
            times = words(text).count(word)
            rarity = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            scale = 0.9 * (1 - 0.4 + 0.4 * len(words(text)) / np.mean(lengths))
            total += rarity * times * 1.9 / (times + scale)
        return total

    expected = sorted(range(4), key=lambda number: (-score(texts[number]), number))
    assert ranker.best([question], 4) == [expected] and ranker.best([question], 2) == [expected[:2]]


def test_context_sources(tmp_path: Path) -> None:
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps({"title": f"T{n}", "text": f"about w{n}"}) + "\n" for n in range(9)))
    passages = read_passages(path)
    source = CollectionContexts(passages, BM25([passage.text for passage in passages]), 2)
    example = Example("1", "what about w4?", ("x",))
    assert source([example])[0][0] == Passage("T4", "about w4")
    long_text = " ".join(f"filler{n}" for n in range(150)) + " the needle is here"
    own = OwnTextContexts(BM25, 1)([Example("2", "where is the needle?", ("x",), (Passage("L", long_text),))])
    assert "needle" in own[0][0].text and len(own[0][0].text.split()) <= 100


def test_dense_encoder_from_a_folder(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    from megatron_retro.evaluation.contexts import DenseRanker

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "bird"]))
    torch.manual_seed(0)
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        initializer_range=1.0,
    )  # fmt: skip
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    embed = bert_embedder(tmp_path, batch_size=2)
    texts = ["cat cat dog", "dog", "bird bird"]
    with torch.inference_mode():
        alone = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0].numpy() for text in texts]
    np.testing.assert_allclose(embed(texts), np.stack(alone), atol=1e-5)
    scores = np.stack(alone) @ alone[1]
    assert DenseRanker(texts, embed, embed).best(["dog"], 3) == [np.argsort(-scores).tolist()]
    with pytest.raises(DataError, match="no encoder folder"):
        bert_embedder(tmp_path / "missing")
