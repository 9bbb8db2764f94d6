"""ROUGE-1, ROUGE-2 and ROUGE-L of a summary by the package rouge-score, and their geometric mean.

`stemming` is a choice that published tables rarely state; SCROLLS and ZeroSCROLLS, from where the summary sets of the
suite are scored, stem, and so does the default here. Several gold summaries: the one with the best value counts, per
measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_retro.runtime.environment import require

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")


def rouge_values(prediction: str, golds: Sequence[str], *, stemming: bool = True) -> dict[str, float]:
    """F-measures by name, and `rouge_geometric_mean` of the three."""
    scorer = _scorer(stemming)
    scored = [scorer.score(gold, prediction) for gold in golds]
    values = {name: max(float(one[name].fmeasure) for one in scored) for name in ROUGE_NAMES}
    product = values["rouge1"] * values["rouge2"] * values["rougeL"]
    return {**values, "rouge_geometric_mean": product ** (1 / 3)}


@lru_cache(maxsize=2)
def _scorer(stemming: bool) -> Any:
    require("rouge_score", "scoring summaries")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE_NAMES), use_stemmer=stemming)
