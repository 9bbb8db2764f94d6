"""Documents beside those that they come back from, what they share marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_retro.reporting.html import facts, page
from megatron_retro.reporting.neighbors import Decode, QueryText, article

_NAMES = {
    "documents": "documents of the database",
    "held_out_documents": "held-out documents",
    "near_held_out": "near a held-out one",
    "near_earlier": "near an earlier one",
    "expected_recall": "recall at the threshold",
    "pairs_passed_over": "pairs passed over",
}


def duplicates_page(counts: Mapping[str, object], shown: Sequence[QueryText], decode: Decode, shortest: int) -> str:
    """The page of a search; runs of at least `shortest` shared tokens are marked."""
    articles = [article(one, decode, len(one.tokens), shortest, heading="h2") for one in shown]
    return page(
        "Documents that come back",
        [facts({_NAMES[name]: value for name, value in counts.items()}), *articles],
        summary=f"{len(shown):,} pairs, the beginnings of both documents. Marked: runs of at least {shortest} tokens "
        "that both have there. A pair is passed over where more than 32 documents look alike.",
    )
