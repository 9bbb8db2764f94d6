"""Text of which the parts that another text shares are marked, as HTML: how neighbours are shown on every page."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from html import escape
from itertools import pairwise

MARKED_STYLE = """
.text { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .86rem; background: var(--panel);
  border-radius: .3rem; padding: .5rem .7rem; overflow-wrap: anywhere; }
.follows { color: var(--soft); } mark { background: var(--mark); color: inherit; }
"""


def shared_runs(text: Sequence[Hashable], other: Sequence[Hashable], shortest: int) -> list[tuple[int, int]]:
    """Ranges of `other` that are in `text` as runs of at least `shortest` tokens, ascending and disjoint."""
    grams = {tuple(text[start : start + shortest]) for start in range(len(text) - shortest + 1)}
    runs: list[tuple[int, int]] = []
    for start in range(len(other) - shortest + 1):
        if tuple(other[start : start + shortest]) in grams:
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], start + shortest)
            else:
                runs.append((start, start + shortest))
    return runs


def marked_text(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], runs: Sequence[tuple[int, int]], chunk_length: int
) -> str:
    """The text of tokens; what lies in `runs` is marked, what lies beyond the chunk is grey."""
    cuts = sorted({0, min(chunk_length, len(tokens)), len(tokens), *(bound for run in runs for bound in run)})
    # Pieces are cut from growing texts: a token decoded alone may lose its space.
    ends = {cut: len(decode(tokens[:cut])) for cut in cuts}
    whole, parts = decode(tokens), []
    for start, stop in pairwise(cuts):
        piece = escape(whole[ends[start] : ends[stop]])
        if any(first <= start and stop <= last for first, last in runs):
            piece = f"<mark>{piece}</mark>"
        parts.append(piece if stop <= chunk_length else f'<span class="follows">{piece}</span>')
    return f'<div class="text">{"".join(parts)}</div>'
