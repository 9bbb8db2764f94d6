"""What a run reads and what text becomes: tokens, neighbours, tokenizer, conversations, and how corpora are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_retro.config.fields import option
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings
from megatron_retro.errors import ConfigError, Violation

KEPT_AS_ONE = ("document", "chunk")
TOKENIZERS = (
    "ByteTokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer",
    "GPTSentencePieceTokenizer", "MegatronSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer",
)  # fmt: skip
LOCAL = "local"
VERIFICATIONS = ("off", "background", "before")
CONTEXT_PLACES = ("prompt", "encoder", "split", "none")


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer"""

    tokenizer_type: str = option(
        "ByteTokenizer", "kind of tokenizer (GPTSentencePieceTokenizer is SentencePieceTokenizer)", choices=TOKENIZERS
    )
    tokenizer_model: str | None = option(None, "sentencepiece model, tokenizer.json, or name of a model on the hub")
    vocab_file: str | None = option(None, "GPT-2 vocabulary (json)")
    merge_file: str | None = option(None, "GPT-2 merges")
    tiktoken_pattern: str = option("v2", "TikTokenizer: where texts are cut into words", choices=("v1", "v2"))
    tiktoken_num_special_tokens: int = option(1000, "TikTokenizer: ids before the vocabulary's", minimum=7)
    tiktoken_special_tokens: tuple[str, ...] | None = option(None, "TikTokenizer: names of the first of these ids")
    allow_tokenizer_mismatch: bool = option(
        False, "go on where a corpus, an index or a model was made with another tokenizer", ours=True
    )


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
            fix="add --tokenizer-type " + " or ".join(TOKENIZERS[1:4]),
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
    verify_tokens: str = option(
        "background", "when token files of 64 MB and more are compared with their checksums", choices=VERIFICATIONS,
        ours=True,
    )  # fmt: skip
    num_workers: int = option(2, "threads that prepare batches", minimum=0)
    data_cache_path: str | None = option(None, "accepted and not needed: no index files are derived from a corpus")
    mock_data: bool = option(False, "random tokens, for timing")
    reset_position_ids: bool = option(False, "positions start again after each document")
    reset_attention_mask: bool = option(False, "no attention over document borders")
    eod_mask_loss: bool = option(False, "no loss on end-of-document tokens")
    # What makes retrieval worse: whole samples in training, as a regularizer; chunks and the database in training and
    # evaluation alike, for studies.
    retro_no_retrieval_probability: float = option(
        0.0, "training: share of samples without neighbours", minimum=0.0, maximum=1.0, ours=True, former_table="retro"
    )
    retro_random_retrieval_probability: float = option(
        0.0, "training: share of samples with another sample's neighbours",
        minimum=0.0, maximum=1.0, ours=True, former_table="retro",
    )  # fmt: skip
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


def degraded_shares_fit(settings: Settings, world_size: int) -> Iterator[Violation]:
    """A chunk reads its own neighbours, another's, or none."""
    if DataConfig not in settings:
        return
    data = settings[DataConfig]
    if data.neighbor_random_share + data.neighbor_absent_share > 1:
        got = f"{data.neighbor_random_share} with --neighbor-absent-share {data.neighbor_absent_share}"
        yield Violation("neighbor_random_share", got, "shares of together at most 1", "lower one of them")


@dataclass(frozen=True)
class ObjectStorageConfig:
    """Token files, tables and databases behind URLs (s3://, gs://, http://)"""

    object_storage_cache_path: str | None = option(None, "folder on a local disk that keeps what was read of them")
    object_storage_cache_gb: float = option(64.0, "GB that it may hold", minimum=0.0, ours=True)


@dataclass(frozen=True)
class InstructionConfig:
    """Instruction tuning: conversations, template, masks, packing"""

    instruction_data: tuple[str, ...] | None = option(
        None, "conversation files, with weights: w1 f1.jsonl w2 f2.jsonl, or files alone", ours=True
    )
    instruction_valid_data: tuple[str, ...] | None = option(None, "conversation files to evaluate on", ours=True)
    instruction_template: str = option(
        "auto",
        "how a conversation is written: instruct-retro, a .jinja file, or auto: as the model was taught, else as "
        "instruct-retro",
        ours=True,
    )
    instruction_bos: bool = option(
        True, "begin a conversation as the tokenizer's own rules say, where its template does not", ours=True
    )
    loss_on_all_replies: bool = option(False, "train on every reply instead of the last", ours=True)
    context_place: str = option(
        "prompt", "where passages go; split: the top one in the prompt, the rest to the encoder",
        choices=CONTEXT_PLACES, ours=True,
    )  # fmt: skip
    num_contexts: int = option(5, "passages of a conversation that are used", minimum=0, ours=True)
    pack_examples: bool = option(False, "several conversations per row, each blind to the others", ours=True)
    bucket_by_length: bool = option(
        False, "a step's rows are of like length, and cut to the longest of them", ours=True
    )
    skip_long_examples: bool = option(False, "pass over conversations longer than a row instead of stopping", ours=True)


@dataclass(frozen=True)
class ContextsConfig:
    """Passages retrieved for conversations"""

    retrieved_contexts: int = option(5, "passages per conversation", minimum=1, ours=True)
    retrieved_context_chunks: int = option(
        2, "chunks of a passage: the one found and what follows it in its document", minimum=1, ours=True
    )
    replace_contexts: bool = option(
        False, "search for conversations that have passages, too, and drop those", ours=True
    )


@dataclass(frozen=True)
class CollectConfig:
    """Text of this machine as a corpus"""

    collect_output: str | None = option(None, "folder for train.jsonl and held_out.jsonl", ours=True)
    collect_held_out: float = option(0.06, "share of documents held out", minimum=0.0, maximum=1.0, ours=True)


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
    tokenizer_hf_include_special_tokens: bool = option(
        False, "HuggingFaceTokenizer: begin every document as the tokenizer's own rules say"
    )
    workers: int | None = option(None, "processes; the cores that this process may use when not set", minimum=1)
    partitions: int = option(1, "Megatron's flag; work is always cut into byte ranges, order never changes", minimum=1)
    shards: int = option(1, "cut the output into this many token files", minimum=1, ours=True)
    shuffle_documents: int | None = option(None, "write documents in a random order of this seed", minimum=0, ours=True)
    resume: bool = option(False, "accepted and not needed: the same command goes on where it stopped", ours=True)
    merge_token_files: tuple[str, ...] | None = option(
        None, "join these token files (prefixes) into --output-prefix; no text is read", ours=True
    )
    checksum_token_files: tuple[str, ...] | None = option(
        None, "write manifests and block checksums beside these token files (prefixes) of other programs", ours=True
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


@dataclass(frozen=True)
class WorkersConfig:
    """Workers of a job that many share"""

    shard: str | None = option(None, "this worker as i/N, from 0; read from SLURM or MPI when not set", ours=True)


@dataclass(frozen=True)
class ExecutorConfig:
    """Who starts the workers"""

    executor: str = option(
        LOCAL,
        "who starts workers: this process itself, an array of SLURM, or a Ray cluster",
        choices=(LOCAL, "slurm", "ray"),
        ours=True,
    )
    executor_workers: int | None = option(
        None, "workers to start; 16 by SLURM, one per CPU of the Ray cluster when not set", minimum=1, ours=True
    )
    sbatch_options: str | None = option(
        None, "words for sbatch of --executor slurm, as '--partition=cpu --cpus-per-task=8'", ours=True
    )
    ray_address: str | None = option(
        None, "the Ray cluster, as HOST:6379; that of RAY_ADDRESS, or this machine alone, when not set", ours=True
    )
