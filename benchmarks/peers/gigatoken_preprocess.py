"""What Megatron-LM's fast preprocessing does, from its description: gigatoken under a single loop over JSON lines.

Lines are read in batches, their texts encoded by gigatoken, ids with an end of document written as `.bin` and `.idx`.
With `raw` the same texts are encoded and nothing is written: the bound of every program on this engine.

    python benchmarks/peers/gigatoken_preprocess.py TOKENIZER INPUT OUTPUT_PREFIX [raw]
"""

from __future__ import annotations

import json
import struct
import sys
from itertools import islice
from pathlib import Path

import gigatoken
import numpy as np

END = "<|endoftext|>"
_BATCH = 512


def load(path: Path) -> tuple[gigatoken.Tokenizer, int]:
    """The tokenizer and the id that ends a document."""
    if path.suffix == ".json":
        tokenizer = gigatoken.Tokenizer(str(path))
        return tokenizer, next(token for token, text in tokenizer.vocab.items() if text == END.encode())
    from sentencepiece import SentencePieceProcessor

    return gigatoken.Tokenizer.from_sentencepiece(path), SentencePieceProcessor(str(path)).eos_id()


def main(model: str, source: str, prefix: str, *, raw: bool) -> None:
    """Write PREFIX.bin and .idx, or only encode."""
    tokenizer, eod = load(Path(model))
    dtype, code = (np.uint16, 8) if tokenizer.vocab_size < 65500 else (np.int32, 4)
    lengths: list[np.ndarray] = []
    with open(source, "rb") as lines, open(f"{prefix}.bin", "wb") as output:
        while batch := list(islice(lines, _BATCH)):
            rows = tokenizer.encode_batch([json.loads(line)["text"] for line in batch], parallel=False).layout
            if raw:
                continue
            offsets = np.asarray(rows.offsets).astype(np.int64)
            counts = np.diff(offsets)
            tokens = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
            kept = counts > 0
            ended = np.insert(tokens, (offsets[1:] - offsets[0])[kept], eod)
            output.write(ended.astype(dtype).tobytes())
            lengths.append(np.where(kept, counts + 1, 0))
    if raw:
        return
    per_line = np.concatenate(lengths)
    sizes = per_line[per_line > 0].astype(np.int32)
    boundaries = np.concatenate([[0], np.cumsum(per_line > 0)]).astype(np.int64)
    pointers = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]]) * np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(boundaries)))
        index.write(sizes.tobytes() + pointers.astype(np.int64).tobytes() + boundaries.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:4], raw=sys.argv[4:] == ["raw"])
