"""Megatron-LM's preprocess_data.py as an algorithm, for comparison: no line of it, the same work.

A pool of workers parses each line and encodes its text; lists of ids are pickled back to one process, which writes
them. What the original does besides (importing torch, splitting sentences, partitions) is left out in its favour.

    python benchmarks/peers/megatron_preprocess.py KIND MODEL INPUT OUTPUT_PREFIX WORKERS
"""

from __future__ import annotations

import json
import multiprocessing
import struct
import sys
from typing import Any

import numpy as np


class _State:
    """What a worker holds."""

    encoder: Any = None
    eod = 0


_state = _State()


def load(kind: str, model: str) -> tuple[Any, int, int]:
    """A function from text to ids, the end-of-document id, the size of the vocabulary."""
    if kind == "sentencepiece":
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model)
        return processor.encode_as_ids, processor.eos_id(), processor.vocab_size()
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(model)
    eod = backend.token_to_id("<|endoftext|>")
    return lambda text: backend.encode(text).ids, eod, backend.get_vocab_size()


def initialize(kind: str, model: str) -> None:
    """Load the tokenizer in a worker."""
    _state.encoder, _state.eod, _ = load(kind, model)


def encode(line: str) -> tuple[list[int], int]:
    """Ids of one JSON line, ended."""
    ids = _state.encoder(json.loads(line)["text"])
    if ids:
        ids.append(_state.eod)
    return ids, len(line)


def main(kind: str, model: str, source: str, prefix: str, workers: int) -> None:
    """Write PREFIX.bin and .idx."""
    _, _, vocabulary = load(kind, model)
    dtype = np.uint16 if vocabulary < 65500 else np.int32
    lengths: list[int] = []
    boundaries = [0]
    with (
        open(source, encoding="utf-8") as lines,
        open(f"{prefix}.bin", "wb") as output,
        multiprocessing.Pool(workers, initialize, (kind, model)) as pool,
    ):
        for ids, _ in pool.imap(encode, lines, 32):
            output.write(np.array(ids, dtype=dtype).tobytes(order="C"))
            if ids:
                lengths.append(len(ids))
            boundaries.append(len(lengths))
        pool.close()
        pool.join()
    sizes = np.array(lengths, np.int32)
    pointers = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]]) * np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as index:
        code = 8 if dtype == np.uint16 else 4
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(boundaries)))
        index.write(sizes.tobytes() + pointers.astype(np.int64).tobytes() + np.array(boundaries, np.int64).tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))  # type: ignore[misc, arg-type, call-arg]  # words of unknown number
