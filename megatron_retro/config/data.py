"""Which tokens, neighbours and tokenizer a run reads."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings
from megatron_retro.errors import ConfigError

KEPT_AS_ONE = ("document", "chunk")
TOKENIZERS = ("ByteTokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer")


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer"""

    tokenizer_type: str = option("ByteTokenizer", "kind of tokenizer", choices=TOKENIZERS)
    tokenizer_model: str | None = option(None, "sentencepiece model or tokenizer.json")
    vocab_file: str | None = option(None, "GPT-2 vocabulary (json)")
    merge_file: str | None = option(None, "GPT-2 merges")


def require_tokenizer_type(settings: Settings) -> None:
    """A tokenizer's file without its kind would be passed over in silence."""
    if TokenizerConfig not in settings or settings.origin("tokenizer_type") != DEFAULT_ORIGIN:
        return
    config = settings[TokenizerConfig]
    files = {"--tokenizer-model": config.tokenizer_model, "--vocab-file": config.vocab_file}
    given = [f"{flag} {file}" for flag, file in files.items() if file is not None]
    if given:
        raise ConfigError(
            "a tokenizer's file is named, but not its kind",
            got=", ".join(given),
            fix="add --tokenizer-type " + " or ".join(TOKENIZERS[1:]),
        )


@dataclass(frozen=True)
class DataConfig:
    """Data of a training run"""

    data_path: tuple[str, ...] | None = option(None, "token file prefixes, with weights: w1 p1 w2 p2, or p1 p2")
    split: str = option("969,30,1", "documents for training, validation, test")
    seq_length: int = option(256, "tokens of a sample (n)", minimum=1)
    neighbor_path: tuple[str, ...] | None = option(
        None, "neighbour tables, one per token file, in the order of --data-path", ours=True
    )
    database_path: str | None = option(None, "chunk database that the tables point into", ours=True)
    valid_data_path: tuple[str, ...] | None = option(None, "token files of a validation corpus of its own")
    valid_neighbor_path: tuple[str, ...] | None = option(None, "its neighbour tables", ours=True)
    epoch_chunk_offset: bool = option(False, "start each epoch at another chunk offset", ours=True)
    max_data_epochs: float | None = option(
        None, "refuse a run that would read some source more often than this", minimum=0.0, ours=True
    )
    num_workers: int = option(2, "threads that prepare batches", minimum=0)
    data_cache_path: str | None = option(None, "accepted and not needed: no index files are derived from a corpus")
    mock_data: bool = option(False, "random tokens, for timing")
    reset_position_ids: bool = option(False, "positions start again after each document")
    reset_attention_mask: bool = option(False, "no attention over document borders")
    eod_mask_loss: bool = option(False, "no loss on end-of-document tokens")
    database_keep_fraction: float = option(
        1.0, "keep this share of the database (chosen by a hash of the id)", minimum=0.0, maximum=1.0, ours=True
    )
    database_keep_by: str = option("document", "what is kept or dropped as one", choices=KEPT_AS_ONE, ours=True)
    database_corpus_fractions: tuple[float, ...] | None = option(
        None, "the same, one share per corpus of the database, times that one", minimum=0.0, maximum=1.0, ours=True
    )
    neighbor_random_share: float = option(
        0.0, "this share of chunks reads another chunk's neighbours, in training and evaluation (a worse retriever)",
        minimum=0.0, maximum=1.0, ours=True,
    )  # fmt: skip
    neighbor_absent_share: float = option(
        0.0, "this share of chunks reads no neighbours, in training and evaluation", minimum=0.0, maximum=1.0, ours=True
    )
