"""Writes the token files beside it, as datatrove 0.10.1 and NeMo Curator 1.4.0 write them.

    pip install datatrove==0.10.1 nemo-curator==1.4.0 'transformers<5' && python -m tests.data.others.make_token_files

Both tokenize `TEXTS` by the tokenizer that `save_byte_level` makes; datatrove also empty ones, with ends and without.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from tests.data.byte_level import save_byte_level

FOLDER = Path(__file__).parent
END = "<|endoftext|>"
_WORDS = ("the", "quick", "document", "says", "again")
TEXTS = [" ".join(f"{word} été {n * k % 13}" for k, word in enumerate(_WORDS * (n % 3 + 1))) for n in range(12)]
WITH_EMPTY = ["", *TEXTS[:6], "", *TEXTS[6:], ""]


def write_with_datatrove(room: Path, name: str, texts: Sequence[str], end: str | None) -> None:
    """Keep what `MegatronDocumentTokenizer` writes as NAME.bin and NAME.idx."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    step = MegatronDocumentTokenizer(str(room), name, str(room / "tokenizer.json"), end)
    step.run([Document(text=text, id=str(number)) for number, text in enumerate(texts)])
    keep(room / f"{name}_00000_tokens", name)


def write_with_nemo_curator(room: Path, name: str) -> None:
    """Keep what `MegatronTokenizerWriter` writes."""
    from nemo_curator.stages.text.io.writer.megatron_tokenizer import MegatronTokenizerWriter
    from transformers import PreTrainedTokenizerFast

    model = PreTrainedTokenizerFast(tokenizer_file=str(room / "tokenizer.json"), eos_token=END)
    model.save_pretrained(room / "model")
    writer = MegatronTokenizerWriter(path=str(room), model_identifier=str(room / "model"), append_eod=True)
    writer.setup()
    batch = SimpleNamespace(
        _metadata={"source_files": ["texts.jsonl"]}, task_id="0", num_items=len(TEXTS), dataset_name="texts",
        _stage_perf=[], to_pandas=lambda: {"text": TEXTS},
    )  # fmt: skip
    keep(Path(writer.process(batch).data[0]).with_suffix(""), name)


def keep(written: Path, name: str) -> None:
    """Put both files of a prefix beside this program."""
    for ending in (".bin", ".idx"):
        shutil.copy(f"{written}{ending}", FOLDER / f"{name}{ending}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        save_byte_level(Path(folder), (END,))
        write_with_datatrove(Path(folder), "datatrove", TEXTS, END)
        write_with_datatrove(Path(folder), "datatrove_with_empty", WITH_EMPTY, END)
        write_with_datatrove(Path(folder), "datatrove_without_ends", WITH_EMPTY, None)
        write_with_nemo_curator(Path(folder), "nemo_curator")
