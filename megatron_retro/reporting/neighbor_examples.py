"""A few held-out chunks with the neighbours that a run reads for them; what they share is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.config.data import DataConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.config.toml_files import read_recipe
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.batches import Batch
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.tokenizers import Tokenizer, build_tokenizer
from megatron_retro.errors import MegatronRetroError
from megatron_retro.reporting.html import paragraph, section
from megatron_retro.reporting.marked_text import marked_text, shared_runs

_EXAMPLES = 3
_SHORTEST_RUN = 4


def neighbor_section(recipe: Path) -> list[str]:
    """The part of a page, if the run reads neighbours and its data is still there."""
    try:
        settings = _stored(recipe)
        if not settings[RetroConfig].reads_neighbors():
            return []
        explained = (
            "Held-out chunks, what follows them (grey), and what they retrieved. Marked: runs of at least "
            f"{_SHORTEST_RUN} tokens that a neighbour shares with the chunk or with what follows it; the model has to "
            "predict what follows."
        )
        return [section("Neighbours", paragraph(explained), *_examples(settings))]
    except MegatronRetroError as error:
        return [section("Neighbours", paragraph(f"not shown: {error.what}", "soft"))]


def _stored(recipe: Path) -> Settings:
    sections = (ModelConfig, RetroConfig, DataConfig, TokenizerConfig, TrainingConfig)
    return build_settings(sections, read_recipe(recipe, sections, ALL_SECTIONS), {})


def _examples(settings: Settings) -> list[str]:
    tokenizer = build_tokenizer(settings[TokenizerConfig])
    batch = build_dataset(settings, "valid", eod=tokenizer.eod).read(range(_EXAMPLES))
    length = settings[RetroConfig].retro_chunk_length
    return [_example(batch, row, tokenizer, length) for row in range(batch.num_samples)]


def _example(batch: Batch, row: int, tokenizer: Tokenizer, length: int) -> str:
    text = batch.tokens_BS[row, : 2 * length].tolist()
    parts = [f"<h3>Held-out sample {row + 1}</h3>", marked_text(tokenizer.decode, text, [], length)]
    found = batch.neighbor_tokens_BCKR
    if found is None or batch.neighbor_mask_BCKR is None:
        return "".join(parts)
    for number, (tokens, there) in enumerate(zip(found[row, 0], batch.neighbor_mask_BCKR[row, 0], strict=True), 1):
        parts.append(f'<p class="soft">neighbour {number}</p>')
        parts.append(_neighbor(text, tokens, there, tokenizer, length) if there.any() else "<p>none</p>")
    return "".join(parts)


def _neighbor(
    text: list[int], tokens: NDArray[Any], there: NDArray[np.bool_], tokenizer: Tokenizer, length: int
) -> str:
    content = tokens[there].tolist()
    return marked_text(tokenizer.decode, content, shared_runs(text, content, _SHORTEST_RUN), length)
