"""Which text is read, and how it becomes token files."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class InputConfig:
    """Text to read: JSON lines (plain, .gz, .zst), Parquet, or plain text files"""

    input: tuple[str, ...] | None = option(None, "files, globs or folders; read in sorted order of each word")
    json_keys: tuple[str, ...] = option(("text",), "fields that hold text, one token file each")
    text_documents: str = option("file", "plain text: what a document is", choices=("file", "line"), ours=True)
    max_document_bytes: int = option(6 << 20, "a longer line or file is refused, never held", minimum=1, ours=True)
    on_error: str = option("stop", "a record that cannot be used", choices=("stop", "skip"), ours=True)


@dataclass(frozen=True)
class PreprocessConfig:
    """Token files from text"""

    output_prefix: str | None = option(None, "writes PREFIX_KEY_document.bin and .idx")
    append_eod: bool = option(False, "end every document with the end-of-document id")
    workers: int | None = option(None, "processes; the cores that this process may use when not set", minimum=1)
    partitions: int = option(1, "Megatron's flag; work is always cut into byte ranges, order never changes", minimum=1)
    shards: int = option(1, "cut the output into this many token files", minimum=1, ours=True)
    shuffle_documents: int | None = option(None, "write documents in a random order of this seed", minimum=0, ours=True)
    resume: bool = option(False, "go on where a stopped run of the same command left off", ours=True)
    merge_token_files: tuple[str, ...] | None = option(
        None, "join these token files (prefixes) into --output-prefix; no text is read", ours=True
    )
    verify: bool = option(False, "read the finished files again and check every number", ours=True)


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """A sentencepiece model of your own"""

    tokenizer_output: str | None = option(None, "writes PREFIX.model and PREFIX.vocab", ours=True)
    tokenizer_vocab_size: int = option(32000, "pieces of the vocabulary", minimum=64, ours=True)
    tokenizer_algorithm: str = option("bpe", "kind of model", choices=("bpe", "unigram"), ours=True)
    tokenizer_sample_bytes: int = option(
        64 << 20, "text that is looked at, spread over the input", minimum=1, ours=True
    )
    tokenizer_threads: int = option(1, "threads; the model depends on the number for unigram", minimum=1, ours=True)
