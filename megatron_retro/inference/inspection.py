"""`inspect-neighbors` and `report`, with a model if one is asked for: what it attends to, what each neighbour is worth
to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_retro.assembly.loading import load_model
from megatron_retro.config.evaluation import ReportConfig
from megatron_retro.config.retrieval import InspectorConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ConfigError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.reading import read_neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.reporting import run_summary
from megatron_retro.reporting.neighbors import Mask, Read, Tokens, Weights
from megatron_retro.retrieval import inspector
from megatron_retro.retrieval.inspector import Reader


def inspect_neighbors(settings: Settings) -> None:
    """Write the pages."""
    path = settings[InspectorConfig].inspect_model
    inspector.inspect_neighbors(settings, None if path is None else _reader(Path(path)))


def report(settings: Settings, names: Sequence[str]) -> None:
    """Write the page of each run, or one of all."""
    if settings[ReportConfig].report_attention:
        run_summary.report(settings, names, _reader_of_run)
    else:
        run_summary.report(settings, names)


def _reader_of_run(run: Path) -> Read | None:
    model = load_model(run, device="cpu", dtype="fp32").module
    return partial(_read, model) if model.retro.reads_neighbors() else None


def _reader(path: Path) -> Reader:
    loaded = load_model(path, device="cpu", dtype="fp32")
    model = loaded.module
    if not model.retro.reads_neighbors():
        raise ConfigError(
            f"--inspect-model {path} reads no neighbours",
            got="a GPT, or a Retro whose gate is shut",
            fix="give a Retro",
        )
    retro = model.retro
    return Reader(loaded.tokenizer, retro.retro_num_neighbors, retro.retrieved_length(), partial(_read, model))


def _read(model: Retro, text: Sequence[int], tokens: Tokens, there: Mask) -> tuple[Weights, Weights]:
    """Of the neighbours of the text's first chunk; later chunks have none."""
    chunks = (len(text) - 1) // model.retro.retro_chunk_length
    shape = (1, max(chunks, 1), *tokens.shape)
    tokens_BCKR, mask_BCKR = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    tokens_BCKR[0, 0], mask_BCKR[0, 0] = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(there)
    reading = read_neighbors(model, torch.tensor(text), Neighbors(tokens_BCKR, mask_BCKR))
    return reading.attention_CKR[0].numpy(), reading.worth_CK[0].numpy()
