"""Exact match and token F1 as SQuAD's official programs define them, and the best over several gold answers.

Normalizing lowers case, drops punctuation and the words a, an, the, and leaves single spaces. An empty gold answer
stands for "cannot be answered" (SQuAD 2.0): it agrees with an empty prediction and with nothing else.

Summaries are scored by the package rouge-score: ROUGE-1, ROUGE-2, ROUGE-L and their geometric mean. `stemming` is a
choice that published tables rarely state; SCROLLS and ZeroSCROLLS, from where the summary sets are scored, stem, and so
does the default here. Of several gold summaries the one with the best value counts, per measure.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from megatron_retro.runtime.environment import require

Metric = Callable[[str, str], float]
ROUGE_NAMES, ROUGE_MEAN = ("rouge1", "rouge2", "rougeL"), "rouge_geometric_mean"
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if both are the same after normalizing."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def token_f1(prediction: str, gold: str) -> float:
    """Harmonic mean of token precision and recall; two empty answers agree."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def overlap_f1(prediction: str, gold: str) -> float:
    """SQuAD 1.1's F1: 0 without a shared token, two empty answers included."""
    return token_f1(prediction, gold) if normalize_answer(gold) else 0.0


def usable_golds(golds: Sequence[str]) -> list[str]:
    """SQuAD 2.0's rule: gold answers that normalize to nothing do not count; without any, the answer is none."""
    return [gold for gold in golds if normalize_answer(gold)] or [""]


def best_over_golds(metric: Metric, prediction: str, golds: Sequence[str]) -> float:
    """The highest value over the gold answers."""
    return max(metric(prediction, gold) for gold in golds)


def rouge_values(prediction: str, golds: Sequence[str], *, stemming: bool = True) -> dict[str, float]:
    """F-measures by name, and `rouge_geometric_mean` of the three."""
    scorer = _scorer(stemming)
    scored = [scorer.score(gold, prediction) for gold in golds]
    values = {name: max(float(one[name].fmeasure) for one in scored) for name in ROUGE_NAMES}
    return {**values, ROUGE_MEAN: geometric_mean(list(values.values()))}


def geometric_mean(values: Sequence[float]) -> float:
    """0 where one of them is."""
    return math.prod(values) ** (1 / len(values))


@lru_cache(maxsize=2)
def _scorer(stemming: bool) -> Any:
    require("rouge_score", "scoring summaries")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE_NAMES), use_stemmer=stemming)
