"""Training of a sentencepiece model on a sample spread over the input.

Every block gives its first records until its share of the sample is full, so the same input gives the same sample.
Bytes stand in for characters that are not in the vocabulary, so nothing is ever unknown.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from megatron_retro.artifacts.files import write_file
from megatron_retro.config.data import InputConfig, TrainTokenizerConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.preprocessing.job import PreprocessingJob, ReadOptions, find_inputs
from megatron_retro.data.preprocessing.records import RecordRefused, read_range, texts_of
from megatron_retro.errors import ArtifactError, ConfigError, DataError
from megatron_retro.runtime.console import readable_bytes, say

_LONGEST_SENTENCE = 4000


def train_tokenizer(settings: Settings) -> None:
    """Write `PREFIX.model` and `PREFIX.vocab`."""
    inputs, config = settings[InputConfig], settings[TrainTokenizerConfig]
    if inputs.input is None or config.tokenizer_output is None:
        raise ConfigError("--input and --tokenizer-output are needed")
    reading = ReadOptions(inputs.json_keys, inputs.text_documents, inputs.max_document_bytes, inputs.on_error)
    job = PreprocessingJob(find_inputs(inputs.input), reading, False, "", "int32")
    model = _train(sampled_lines(job, config.tokenizer_sample_bytes), config)
    target = Path(f"{config.tokenizer_output}.model")
    if target.exists() and target.read_bytes() != model:
        raise ArtifactError(
            f"{target} exists already and is another model",
            fix="give another --tokenizer-output, or remove it if no corpus is tokenized with it",
        )
    write_file(target, model)
    write_file(Path(f"{config.tokenizer_output}.vocab"), _vocabulary(model))
    say(f"wrote {config.tokenizer_output}.model and .vocab ({readable_bytes(job.num_bytes)} of input)")


def _train(lines: Iterator[str], config: TrainTokenizerConfig) -> bytes:
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            vocab_size=config.tokenizer_vocab_size,
            model_type=config.tokenizer_algorithm,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=config.tokenizer_threads,
            max_sentence_length=4 * _LONGEST_SENTENCE,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            "sentencepiece cannot train a model on this text",
            got=str(error).strip().splitlines()[-1],
            fix="raise --tokenizer-vocab-size: bytes and characters take so many pieces already"
            if "smaller than required_chars" in str(error)
            else "give more text or a smaller --tokenizer-vocab-size",
        ) from None
    return written.getvalue()


def sampled_lines(job: PreprocessingJob, sample_bytes: int) -> Iterator[str]:
    """Lines of the sample; long ones are cut, since sentencepiece drops them."""
    share = max(1, sample_bytes // max(len(job.blocks), 1))
    for block in job.blocks:
        left = share
        for span in block:
            for record in read_range(job, span):
                if left <= 0:
                    break
                try:
                    texts = texts_of(record, job) or {}
                except RecordRefused as reason:
                    if job.reading.on_error == "stop":
                        raise DataError(f"{record.place}: {reason}") from None
                    continue
                for line in _lines(texts):
                    left -= len(line)
                    yield line


def _lines(texts: dict[str, list[str]]) -> Iterator[str]:
    for parts in texts.values():
        for text in parts:
            for line in text.splitlines():
                for start in range(0, len(line), _LONGEST_SENTENCE):
                    yield line[start : start + _LONGEST_SENTENCE]


def _vocabulary(model: bytes) -> str:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    rows = range(processor.vocab_size())
    return "".join(f"{processor.id_to_piece(row)}\t{processor.get_score(row):g}\n" for row in rows)
