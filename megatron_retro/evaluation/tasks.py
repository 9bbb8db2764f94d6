"""The evaluation sets: how each is read, asked and scored. One row per set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_retro.errors import ConfigError
from megatron_retro.evaluation import answer_sets, document_sets
from megatron_retro.evaluation.examples import Example
from megatron_retro.evaluation.metrics import (
    ROUGE_MEAN,
    ROUGE_NAMES,
    best_over_golds,
    exact_match,
    geometric_mean,
    normalize_answer,
    overlap_f1,
    rouge_values,
    token_f1,
    usable_golds,
)
from megatron_retro.evaluation.prompts import Form, option_letters

# Alone on its line, or marked off from what follows: "A strange feeling" is no letter.
_LETTER = re.compile(r"\s*\(?([A-Z])(?=\s*$|[,:)]|\.(?!\w))", re.MULTILINE)
# What a model says instead of an answer. SQuAD 2.0's program knows only the empty answer, so these become one.
_ABSTENTIONS = re.compile(
    r"\b(unanswerable|no answer|cannot answer|(cannot|can not|could not|can't|not) be (found|answered|determined)"
    r"|not (mentioned|stated|specified|provided|given) in the (context|text|passage)"
    r"|(context|text|passage) does not (say|mention|state|specify|provide|contain))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Scoring:
    """Choices that published tables differ in."""

    first_answer: bool = False
    stemming: bool = True


Scorer = Callable[[str, Example, Scoring], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A set: `metrics` are its columns, the first is the published one."""

    name: str
    title: str
    load: Callable[[Path], Iterator[Example]]
    form: Form
    score: Scorer
    metrics: tuple[str, ...]


def golds_of(example: Example, scoring: Scoring) -> list[str]:
    """The gold answers that count."""
    golds = usable_golds(example.answers)
    return golds[:1] if scoring.first_answer else golds


def score_span(prediction: str, example: Example, scoring: Scoring) -> dict[str, float]:
    """Exact match and F1, the best over gold answers."""
    golds = golds_of(example, scoring)
    return {
        "em": best_over_golds(exact_match, prediction, golds),
        "f1": best_over_golds(token_f1, prediction, golds),
    }


def score_squad1(prediction: str, example: Example, scoring: Scoring) -> dict[str, float]:
    """As SQuAD 1.1's program: every gold answer counts, and agreement on nothing is no agreement."""
    golds = example.answers[:1] if scoring.first_answer else example.answers
    return {
        "em": best_over_golds(exact_match, prediction, golds),
        "f1": best_over_golds(overlap_f1, prediction, golds),
    }


def score_span_or_none(prediction: str, example: Example, scoring: Scoring) -> dict[str, float]:
    """SQuAD 2.0: as its program does, after abstentions became the empty answer; also by answerability."""
    values = score_span("" if abstains(prediction) else prediction, example, scoring)
    kind = "has_answer" if example.answers else "no_answer"
    return {**values, **{f"{kind}_{name}": value for name, value in values.items()}}


def abstains(prediction: str) -> bool:
    """Whether the model says that there is no answer."""
    return not normalize_answer(prediction) or _ABSTENTIONS.search(prediction) is not None


def score_truth(prediction: str, example: Example, scoring: Scoring) -> dict[str, float]:
    """Whether the first word that is true, false, yes or no is the right one."""
    found = re.search(r"\b(true|false|yes|no)\b", prediction.lower())
    said = found is not None and found[1] in ("true", "yes")
    right = found is not None and said == (example.answers[0] == "True")
    return {"accuracy": float(right)}


def score_choice(prediction: str, example: Example, scoring: Scoring) -> dict[str, float]:
    """Exact match of the option's text; where the answer is no option's text, its letter if one leads the answer."""
    said, gold = normalize_answer(prediction), example.answers[0]
    letter = _LETTER.match(prediction)
    letters = option_letters(len(example.options))
    if letter and letter[1] in letters and not (said and said in map(normalize_answer, example.options)):
        return {"em": float(example.options[letters.index(letter[1])] == gold)}
    return {"em": exact_match(prediction, gold)}


def score_summary(prediction: str, example: Example, scoring: Scoring) -> dict[str, float]:
    """ROUGE."""
    golds = example.answers[:1] if scoring.first_answer else example.answers
    return rouge_values(prediction, golds, stemming=scoring.stemming)


_ROUGE = (ROUGE_MEAN, *ROUGE_NAMES)
_EM_FIRST, _F1_FIRST = ("em", "f1"), ("f1", "em")
_SQUAD2 = ("f1", "em", "has_answer_f1", "has_answer_em", "no_answer_f1", "no_answer_em")

TASKS: tuple[Task, ...] = (
    Task("nq", "NQ-open", answer_sets.load_open_questions, Form.SHORT, score_span, _EM_FIRST),
    Task("triviaqa", "TriviaQA", answer_sets.load_trivia_qa, Form.SHORT, score_span, _EM_FIRST),
    Task("webquestions", "WebQuestions", answer_sets.load_web_questions, Form.SHORT, score_span, _EM_FIRST),
    Task("squad1", "SQuAD 1.1", answer_sets.load_squad, Form.SHORT, score_squad1, _F1_FIRST),
    Task("squad2", "SQuAD 2.0", answer_sets.load_squad, Form.SHORT, score_span_or_none, _SQUAD2),
    Task("newsqa", "NewsQA", answer_sets.load_newsqa, Form.SHORT, score_span, _F1_FIRST),
    Task("quoref", "Quoref", answer_sets.load_quoref, Form.SHORT, score_span, _F1_FIRST),
    Task("drop", "DROP", answer_sets.load_drop, Form.SHORT, score_span, _F1_FIRST),
    Task("narrativeqa", "NarrativeQA", document_sets.load_narrative_qa, Form.SHORT, score_span, _F1_FIRST),
    Task("qasper", "Qasper", document_sets.load_qasper, Form.SHORT, score_span, _F1_FIRST),
    Task("quality", "QuALITY", document_sets.load_quality, Form.CHOICE, score_choice, ("em",)),
    Task("doc2dial", "doc2dial", document_sets.load_doc2dial, Form.TALK, score_span, _F1_FIRST),
    Task("boolq", "BoolQ", answer_sets.load_bool_q, Form.TRUE_FALSE, score_truth, ("accuracy",)),
    Task("qmsum", "QMSum", document_sets.load_qmsum, Form.LONG, score_summary, _ROUGE),
    Task("govreport", "GovReport", document_sets.load_gov_report, Form.LONG, score_summary, _ROUGE),
    Task("summscreen", "SummScreenFD", document_sets.load_summ_screen, Form.LONG, score_summary, _ROUGE),
)


def find_task(name: str) -> Task:
    """The task of a name."""
    by_name = {task.name: task for task in TASKS}
    if name not in by_name:
        raise ConfigError(f"there is no evaluation task {name!r}", expected="one of " + ", ".join(by_name))
    return by_name[name]


def average(values: Sequence[dict[str, float]], metrics: Sequence[str]) -> dict[str, float]:
    """Means times 100, over the examples that have the metric; a metric that none has is left out.

    The geometric mean of ROUGE is that of the set's three means, as SCROLLS' program aggregates.
    """
    found: dict[str, float] = {}
    for name in metrics:
        given = [one[name] for one in values if name in one]
        if given:
            found[name] = 100.0 * sum(given) / len(given)
    if ROUGE_MEAN in found:
        found[ROUGE_MEAN] = geometric_mean([found[name] for name in ROUGE_NAMES])
    return found
