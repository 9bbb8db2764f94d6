"""What Megatron-LM makes of sentencepiece models beside their own ids: tokens behind them, or one before a text.

Documents of its own `SentencePieceTokenizer` end with `<EOD>`, an id beyond the model. Here it is called
`MegatronSentencePieceTokenizer`, because `SentencePieceTokenizer` has always meant the model alone (Megatron's
`GPTSentencePieceTokenizer`) in files of ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_retro.data.tokenizers import SentencePieceTokenizer, utf8
from megatron_retro.errors import ArtifactError

_ADDED = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
_ROLES = {"pad_id": "<PAD>", "bos_id": "<BOS>", "eos_id": "<EOS>"}


class MegatronSentencePieceTokenizer:
    """Special tokens stand for themselves in a text; what is between them is the model's."""

    def __init__(self, model: Path) -> None:
        self._pieces = SentencePieceTokenizer(model, needs_end=False)
        count = self._pieces.vocab_size
        processor = self._pieces.processor
        ids = {processor.id_to_piece(token): token for token in range(count)}
        self.specials: dict[str, int] = {}
        for name in (*_ADDED, *self._role_names(count)):
            self.specials[name] = ids.setdefault(name, len(ids))
        self._names = {token: name for name, token in self.specials.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) + ")")
        self.vocab_size = len(ids)
        self.eod = self.specials["<EOD>"]
        self.fingerprint = hashlib.sha256(b"MegatronSentencePiece" + self._pieces.model_bytes).hexdigest()

    def _role_names(self, count: int) -> Iterator[str]:
        processor = self._pieces.processor
        for role, name in _ROLES.items():
            token = getattr(processor, role)()
            yield processor.id_to_piece(token) if 0 <= token < count else name

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""
        utf8(text)
        ids: list[int] = []
        for place, part in enumerate(self._split.split(text)):
            ids += [self.specials[part]] if place % 2 else self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; `eod` vanishes."""
        text = ""
        run: list[int] = []
        for token in ids:
            if token in self._names:
                text += self._pieces.decode(run) + ("" if token == self.eod else self._names[token])
                run = []
            else:
                run.append(token)
        return text + self._pieces.decode(run)


class Llama2Tokenizer(SentencePieceTokenizer):
    """The model alone; every document of a token file begins with the begin-of-sentence piece, and so does a prompt."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        begin = int(self.processor.bos_id())
        if begin < 0 or self.processor.eos_id() < 0:
            raise ArtifactError(
                f"{model} has no begin-of-sentence or no end-of-sentence piece",
                got=f"ids {begin} and {self.processor.eos_id()}",
                fix="use --tokenizer-type GPTSentencePieceTokenizer",
            )
        self.begins = (begin,)
        self.fingerprint = hashlib.sha256(b"Llama2" + self.model_bytes).hexdigest()
