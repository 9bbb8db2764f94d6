"""Chunks beside the neighbours that they retrieved, what they share marked: in a page of their own, or in a run's.

The page can be read without a script; the script only searches it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_retro.config.data import DataConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.config.toml_files import read_recipe
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.model_text import kept_text_files
from megatron_retro.data.tokenizers import build_tokenizer
from megatron_retro.errors import MegatronRetroError
from megatron_retro.reporting.html import page, paragraph, section

Tokens: TypeAlias = NDArray[np.integer[Any]]
Mask: TypeAlias = NDArray[np.bool_]
Weights: TypeAlias = NDArray[np.floating[Any]]
Decode: TypeAlias = Callable[[Sequence[int]], str]
# A model that reads: neighbours [K, R] of the first chunk of a text, to what was attended to [K, R] and worth [K].
Read: TypeAlias = Callable[[Sequence[int], Tokens, Mask], tuple[Weights, Weights]]
_EXAMPLES = 3  # held-out samples on a run's page
_SHORTEST_RUN = 4  # tokens that are worth a mark there
_UNDERLINED = (
    " Underlined: what the model attended to while it predicted what follows, over all heads and layers, the stronger "
    "the more. Worth: what the prediction of what follows loses without that neighbour, in nats."
)
_SHADES = 5  # of what was attended to; their colors stand in the style
ATTENTION_STYLE = """
[class^=read-] { box-shadow: inset 0 -.28em color-mix(in srgb, var(--s1) var(--share), transparent); }
.read-1 { --share: 20%; } .read-2 { --share: 40%; } .read-3 { --share: 60%; } .read-4 { --share: 80%; }
.read-5 { --share: 100%; }
"""
_STYLE = """
#find { position: sticky; top: 0; background: var(--paper); padding: .6rem 0; border-bottom: 1px solid var(--rule); }
#find input { font: inherit; padding: .35rem .6rem; width: min(30rem, 70vw); border: 1px solid var(--soft);
  border-radius: .3rem; background: var(--paper); color: var(--ink); }
[hidden] { display: none; }
"""
_SCRIPT = """
const input = document.querySelector('#find input'), count = document.querySelector('#count');
const articles = [...document.querySelectorAll('article')];
const texts = articles.map(one => one.textContent.toLowerCase());
function search() {
  const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  articles.forEach((one, number) => {
    one.hidden = !words.every(word => texts[number].includes(word));
    shown += one.hidden ? 0 : 1;
  });
  count.textContent = shown + ' of ' + articles.length + ' chunks';
}
input.addEventListener('input', search);
search();
"""


@dataclass(frozen=True)
class RetrievedText:
    """A neighbour under its title: a chunk and its continuation; where a model read it, what each token got of that
    model's attention."""

    title: str
    tokens: Sequence[int]
    attention: Sequence[float] = ()


@dataclass(frozen=True)
class QueryText:
    """A chunk with what follows it, and what it retrieved."""

    title: str
    tokens: Sequence[int]
    neighbors: Sequence[RetrievedText]


def retrieved_texts(
    titles: Sequence[str], text: Sequence[int], tokens_KR: Tokens, mask_KR: Mask, read: Read | None
) -> list[RetrievedText]:
    """A text's neighbours, with what a model attended to and what each is worth to it if one reads them."""
    rows = zip(titles, tokens_KR, mask_KR, strict=True)
    if read is None:
        return [RetrievedText(title, tokens[mask].tolist()) for title, tokens, mask in rows]
    attention_KR, worth_K = read(text, tokens_KR, mask_KR)
    return [
        RetrievedText(f"{title}, worth {value:+.2f} nats", tokens[mask].tolist(), weights[mask].tolist())
        for (title, tokens, mask), weights, value in zip(rows, attention_KR, worth_K, strict=True)
    ]


def inspector_page(
    name: str, shown: Sequence[QueryText], num_rows: int, decode: Decode, chunk_length: int, shortest: int
) -> str:
    """The page of one table; runs of at least `shortest` shared tokens are marked."""
    were_read = any(neighbor.attention for one in shown for neighbor in one.neighbors)
    find = (
        '<div id="find" role="search"><label>Find <input type="search" placeholder="words, chunk or document numbers">'
        '</label> <span id="count" class="soft" aria-live="polite"></span></div>'
    )
    return page(
        f"Neighbours of {name}",
        [find, *(article(one, decode, chunk_length, shortest, heading="h2") for one in shown)],
        summary=f"{len(shown):,} of {num_rows:,} query chunks. Marked: runs of at least {shortest} tokens that a "
        "neighbour shares with the chunk or with what follows it. Grey: what follows."
        + (_UNDERLINED if were_read else ""),
        style=ATTENTION_STYLE + _STYLE,
        script=_SCRIPT,
    )


def neighbor_section(recipe: Path, read: Read | None = None) -> list[str]:
    """A few held-out chunks of a run with the neighbours that it reads for them; nothing for a run that reads none."""
    try:
        sections = (ModelConfig, RetroConfig, DataConfig, TokenizerConfig, TrainingConfig)
        settings = build_settings(sections, read_recipe(recipe, sections, ALL_SECTIONS), {})
        if not settings[RetroConfig].reads_neighbors():
            return []
        words = paragraph(
            "Held-out chunks, what follows them (grey), and what they retrieved. Marked: runs of at least "
            f"{_SHORTEST_RUN} tokens that a neighbour shares with the chunk or with what follows it; the model has to "
            "predict what follows." + (_UNDERLINED if read else "")
        )
        return [section("Neighbours", words, *_held_out(settings, recipe.parent, read))]
    except MegatronRetroError as error:
        return [section("Neighbours", paragraph(f"not shown: {error.what}", "soft"))]


def _held_out(settings: Settings, run: Path, read: Read | None) -> Iterator[str]:
    tokenizer = build_tokenizer(kept_text_files(settings[TokenizerConfig], run))
    batch = build_dataset(settings, "valid", eod=tokenizer.eod).read(range(_EXAMPLES))
    length, found = settings[RetroConfig].retro_chunk_length, batch.neighbors
    for row in range(batch.num_samples):
        text, retrieved = batch.tokens_BS[row, : 2 * length].tolist(), list[RetrievedText]()
        if found is not None:
            tokens_KR, mask_KR = found.tokens_BCKR[row, 0], found.mask_BCKR[row, 0]
            titles = [f"neighbour {number}" for number in range(1, len(tokens_KR) + 1)]
            retrieved = retrieved_texts(titles, text, tokens_KR, mask_KR, read)
        shown = QueryText(f"Held-out sample {row + 1}", text, [one for one in retrieved if one.tokens])
        yield article(shown, tokenizer.decode, length, _SHORTEST_RUN)


def article(shown: QueryText, decode: Decode, chunk_length: int, shortest: int, heading: str = "h3") -> str:
    """A text and what is beside it, with what they share marked."""
    items = [
        f'<li><div class="soft">{escape(one.title)}</div>'
        + marked_text(decode, one.tokens, shared_runs(shown.tokens, one.tokens, shortest), chunk_length, one.attention)
        + "</li>"
        for one in shown.neighbors
    ]
    listed = f"<ol>{''.join(items)}</ol>" if items else '<p class="soft">It has no neighbours.</p>'
    body = marked_text(decode, shown.tokens, [], chunk_length)
    return f"<article><{heading}>{escape(shown.title)}</{heading}>{body}{listed}</article>"


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
    decode: Decode,
    tokens: Sequence[int],
    runs: Sequence[tuple[int, int]],
    chunk_length: int,
    attention: Sequence[float] = (),
) -> str:
    """The text of tokens; what lies in `runs` is marked, what lies beyond the chunk is grey; the more a token was
    attended to, the darker is what lies under it."""
    bounds = range(len(attention) + 1) if attention else (bound for run in runs for bound in run)
    cuts = sorted({0, min(chunk_length, len(tokens)), len(tokens), *bounds})
    shades = _shades(attention)
    # Pieces are cut from growing texts: a token decoded alone may lose its space.
    ends = {cut: len(decode(tokens[:cut])) for cut in cuts}
    whole, parts = decode(tokens), []
    for start, stop in pairwise(cuts):
        piece = escape(whole[ends[start] : ends[stop]])
        if any(first <= start and stop <= last for first, last in runs):
            piece = f"<mark>{piece}</mark>"
        if start < len(shades) and shades[start]:
            piece = f'<span class="read-{shades[start]}" title="attention {attention[start]:.3g}">{piece}</span>'
        parts.append(piece if stop <= chunk_length else f'<span class="follows">{piece}</span>')
    return f'<div class="text">{"".join(parts)}</div>'


def _shades(attention: Sequence[float]) -> list[int]:
    """0 for little, _SHADES for most. The first token, where attention rests that finds nothing, is not counted."""
    most = max(attention[1:], default=0.0)
    return [0, *(round(_SHADES * one / most) if most > 0 else 0 for one in attention[1:])]
