"""`megatron-retro train-tokenizer`: a sentencepiece model from your own text."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.data import InputConfig, TrainTokenizerConfig
from megatron_retro.config.settings import Settings

DESCRIPTION = "Train a sentencepiece model (BPE or unigram) on a sample of the input, with byte fallback."
SECTIONS: tuple[type, ...] = (InputConfig, TrainTokenizerConfig)
POSITIONAL: Positional | None = None


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Write PREFIX.model and PREFIX.vocab."""
    from megatron_retro.data.preprocessing.tokenizer_training import train_tokenizer

    train_tokenizer(settings[InputConfig], settings[TrainTokenizerConfig])
