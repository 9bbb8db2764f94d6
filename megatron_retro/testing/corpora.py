"""Small corpora and tokenizers for tests, and Megatron's own algorithms written out plainly to compare with."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_retro.data.token_writer import TokenFileWriter
from megatron_retro.data.tokenizers import GPT2BPETokenizer, HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_retro.runtime.strict_json import json_text

Sequences = list[list[int]]
# The splitting patterns of Llama 3's and of Qwen's tokenizers.
_WORDS_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST_PATTERN = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = (
    rf"{_WORDS_PATTERN}|\p{{N}}{{1,3}}|{_REST_PATTERN}",
    rf"{_WORDS_PATTERN}|\p{{N}}|{_REST_PATTERN}",
)
_PHRASE = (
    "the of and to in retrieval chunk neighbour token language model don't they'll I'm 1810 3.14159 Encyclopædia "
    "naïve Москва 東京 … — (see plate) a.b,c;d foo_bar x=y+1 HELLO e\u0301te\u0301 ½ ﬁne"
)
WORDS = _PHRASE.split()
SPACES = (" ", " ", " ", "  ", "\n", "\n\n", "\t", " \n  ", "\u00a0", "\u3000", "\r\n", "\u200b", "")


def random_text(generator: random.Random, words: int) -> str:
    """Words and white space of many kinds."""
    return "".join(generator.choice(WORDS) + generator.choice(SPACES) for _ in range(words))


def random_documents(seed: int, count: int, longest: int = 400, vocab: int = 256) -> list[list[int]]:
    """Token documents, some of them empty."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, vocab, generator.integers(0, longest + 1) * (generator.random() > 0.1)).tolist()
        for _ in range(count)
    ]


def write_documents(prefix: Path, documents: Iterable[Sequence[int]], dtype: str = "uint16") -> None:
    """A token file of documents, each of one sequence (none when it is empty)."""
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            lengths = np.array([len(document)] if document else [], np.int32)
            writer.add_documents(np.array(document, np.int64), lengths, np.array([len(lengths)]))
        writer.finalize()


def write_reference_token_file(prefix: Path, documents: Iterable[Sequences], dtype: str, modes: bool = False) -> None:
    """Megatron's IndexedDatasetBuilder, value by value. A document is a list of sequences."""
    code = {"uint16": 8, "int32": 4, "uint8": 1, "int64": 5}[dtype]
    itemsize = np.dtype(dtype).itemsize
    lengths: list[int] = []
    boundaries = [0]
    with open(f"{prefix}.bin", "wb") as stream:
        for document in documents:
            for sequence in document:
                stream.write(np.array(sequence, dtype).tobytes())
                lengths.append(len(sequence))
            boundaries.append(len(lengths))
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code))
        stream.write(struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(boundaries)))
        stream.write(struct.pack(f"<{len(lengths)}i", *lengths))
        pointer = 0
        for length in lengths:
            stream.write(struct.pack("<q", pointer))
            pointer += length * itemsize
        stream.write(struct.pack(f"<{len(boundaries)}q", *boundaries))
        if modes:
            stream.write(struct.pack(f"<{len(lengths)}b", *[0] * len(lengths)))


def megatron_documents(
    lines: Iterable[str], key: str, encode: Callable[[str], list[int]], eod: int | None
) -> list[Sequences]:
    """What Megatron's preprocess_data.py stores for JSON lines."""
    documents = []
    for line in lines:
        text = json.loads(line)[key]
        sequences: Sequences = []
        for sentence in text if isinstance(text, list) else [text]:
            ids = encode(sentence)
            if len(ids) > 0:
                sequences.append(list(ids))
        if sequences and eod is not None:
            sequences[-1].append(eod)
        documents.append(sequences)
    return documents


def training_lines(count: int = 4000) -> list[str]:
    """Text for small tokenizers."""
    generator = random.Random(0)
    return [random_text(generator, 20).replace("\n", " ") for _ in range(count // 20)] + WORDS * 20


def small_sentencepiece(path: Path, **settings: Any) -> SentencePieceTokenizer:
    """A sentencepiece model trained in a moment."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    options = {"vocab_size": 420, "model_type": "bpe", "character_coverage": 0.9995, **settings}
    SentencePieceTrainer.train(
        sentence_iterator=iter(training_lines()),
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    path.write_bytes(written.getvalue())
    return SentencePieceTokenizer(path)


def small_byte_level_files(folder: Path) -> tuple[Path, Path]:
    """GPT-2's two files of a small vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(training_lines(), trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json_text(model["vocab"]), encoding="utf-8")
    pairs = "\n".join(" ".join(pair) for pair in model["merges"])
    merges.write_text("#version: 0.2\n" + pairs + "\n", encoding="utf-8")
    return vocabulary, merges


def small_gpt2(folder: Path) -> GPT2BPETokenizer:
    """A byte-level BPE from GPT-2 files."""
    return GPT2BPETokenizer(*small_byte_level_files(folder))


def small_hugging_face(
    folder: Path, pattern: int | None = None, *, nfc: bool = False, add_prefix_space: bool = False
) -> HuggingFaceTokenizer:
    """A `tokenizer.json`: GPT-2's splitting, or one of the published patterns by number."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = small_byte_level_files(folder)
    backend = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERNS[pattern]), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|turn|>", special=True)])
    path = folder / "tokenizer.json"
    backend.save(str(path))
    return HuggingFaceTokenizer(path)


def write_json_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json_text(record) + "\n" for record in records), encoding="utf-8")
    return path
