"""EM and F1 follow the rules of SQuAD's programs, written down here a second time; ROUGE is rouge-score's."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_retro.config.evaluation import QUESTION_SETS
from megatron_retro.evaluation.examples import Example
from megatron_retro.evaluation.metrics import exact_match, normalize_answer, overlap_f1, rouge_values, token_f1
from megatron_retro.evaluation.tasks import TASKS, Scoring, abstains, average, find_task

words = st.sampled_from(["the", "a", "An", "cat", "Cat's", "dog", "U.S.", "1,000", "is", "été", "—", "", "theatre"])
answers = st.lists(words, max_size=6).map(" ".join) | st.text(max_size=20)


def reference_tokens(text: str) -> list[str]:
    lowered = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in re.split(r"\s+", re.sub(r"\b(?:an|the|a)\b", " ", lowered)) if word]


def reference_f1(first: Sequence[str], second: Sequence[str]) -> float:
    left, shared = list(second), 0
    for word in first:
        if word in left:
            left.remove(word)
            shared += 1
    if not first or not second:
        return float(list(first) == list(second))
    return 2 * shared / (len(first) + len(second))


@settings(max_examples=60, deadline=None)
@given(answers, answers)
def test_rules(prediction: str, gold: str) -> None:
    mine, theirs = reference_tokens(prediction), reference_tokens(gold)
    assert normalize_answer(prediction).split() == mine
    assert exact_match(prediction, gold) == float(mine == theirs)
    assert token_f1(prediction, gold) == pytest.approx(reference_f1(mine, theirs), abs=1e-12)
    assert overlap_f1(prediction, gold) == pytest.approx(reference_f1(mine, theirs) if theirs else 0.0, abs=1e-12)


def example(*golds: str, options: tuple[str, ...] = ()) -> Example:
    return Example("x", "q?", golds, options=options)


def test_best_and_first_gold() -> None:
    task = find_task("nq")
    several = example("wrong", "The right one")
    assert task.score("right one", several, Scoring()) == {"em": 1.0, "f1": 1.0}
    assert task.score("right one", several, Scoring(first_answer=True)) == {"em": 0.0, "f1": 0.0}


def test_unanswerable() -> None:
    task = find_task("squad2")
    nothing, something = example(), example("Paris")
    assert task.score("", nothing, Scoring())["f1"] == 1.0
    assert task.score("The answer cannot be found in the context.", nothing, Scoring())["em"] == 1.0
    assert task.score("Paris", nothing, Scoring())["no_answer_em"] == 0.0
    assert task.score("", something, Scoring())["has_answer_f1"] == 0.0
    scores = [task.score("", nothing, Scoring()), task.score("paris", something, Scoring())]
    found = average(scores, task.metrics)
    assert found["f1"] == 100.0 and found["no_answer_f1"] == found["has_answer_em"] == 100.0
    assert abstains("Unanswerable") and not abstains("Nothing Compares 2 U")
    assert find_task("squad1").score("", example("The"), Scoring()) == {"em": 1.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        *(("B", 1), ("(B) second", 1), ("B. second", 1), ("B) it is", 1), ("B\nsecond", 1), ("second", 1)),
        *(("The Second.", 1), ("A", 0), ("Bad", 0), ("B.C. it was", 0), ("A strange feeling", 0), ("(C) second", 0)),
    ],
)
def test_choices(prediction: str, right: int) -> None:
    asked = example("second", options=("first", "second", "A strange feeling", "fourth"))
    assert find_task("quality").score(prediction, asked, Scoring()) == {"em": float(right)}


@pytest.mark.parametrize("prediction", ["A strange feeling", "A strange feeling, he said", "A, B and C"])
def test_an_article_is_no_letter_and_another_options_text_is_wrong(prediction: str) -> None:
    asked = example("He was afraid", options=("He was afraid", "nothing", "A strange feeling", "A, B and C"))
    assert find_task("quality").score(prediction, asked, Scoring()) == {"em": 0.0}


@pytest.mark.parametrize(("prediction", "right"), [("True", 1), ("yes, it is", 1), ("False", 0), ("maybe", 0), ("", 0)])
def test_truth(prediction: str, right: int) -> None:
    assert find_task("boolq").score(prediction, example("True"), Scoring()) == {"accuracy": float(right)}


def test_rouge() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    gold, said = "The cats were running over the mats quickly.", "A cat runs over the mat. Quickly the cats ran."
    for stemming in (True, False):
        expected = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemming).score(gold, said)
        found = rouge_values(said, [gold, "something else"], stemming=stemming)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value.fmeasure)
        product = found["rouge1"] * found["rouge2"] * found["rougeL"]
        assert found["rouge_geometric_mean"] ** 3 == pytest.approx(product)
    assert rouge_values(said, [gold], stemming=True)["rouge1"] > rouge_values(said, [gold], stemming=False)["rouge1"]


def test_a_sets_rouge_is_averaged_before_its_geometric_mean() -> None:
    scored = [
        dict(zip(("rouge1", "rouge2", "rougeL", "rouge_geometric_mean"), values, strict=True))
        for values in ((1.0, 1.0, 1.0, 1.0), (0.3, 0.0, 0.3, 0.0))
    ]
    found = average(scored, find_task("qmsum").metrics)
    assert found["rouge1"] == pytest.approx(65.0) and found["rouge2"] == pytest.approx(50.0)
    assert found["rouge_geometric_mean"] == pytest.approx((65.0 * 50.0 * 65.0) ** (1 / 3))


def test_every_set_that_the_command_line_names_is_there() -> None:
    assert tuple(task.name for task in TASKS) == QUESTION_SETS
