"""How many rows run out of neighbours: what a share of the database, or the sample's own documents, leave too few of.

A database made smaller by `--database-keep-fraction` is read from the same table. A row whose saved neighbours are
mostly dropped has fewer than k left, so a study over database sizes must say how often that was.
"""

from __future__ import annotations

import numpy as np

from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.dataset import short_rows

_MOST_SAMPLES = 2000


def neighbor_shortage(settings: Settings, *, most_samples: int = _MOST_SAMPLES) -> float | None:
    """Share of the training rows with fewer than k legal neighbours, from at most so many samples of each corpus.

    None for runs that read no neighbours from tables.
    """
    if RetroConfig not in settings:  # an evaluation knows its model's and says so itself
        return None
    data, retro = settings[DataConfig], settings[RetroConfig]
    if not retro.retro_add_retriever or data.data_path is None or data.neighbor_path is None or data.mock_data:
        return None
    dataset = build_dataset(Settings([data, retro, settings[TrainingConfig]]), "train", eod=None)
    counts = np.array([short_rows(source, most_samples) for source in dataset.sources])
    weights = np.asarray(dataset.blend.weights, np.float64)
    shares = counts[:, 0] / np.maximum(counts[:, 1], 1)
    return float((weights * shares).sum() / weights.sum())
