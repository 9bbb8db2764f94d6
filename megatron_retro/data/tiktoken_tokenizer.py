"""Megatron-LM's `TikTokenizer`: special tokens first, then the ranks of a vocabulary in JSON, shifted behind them.

The vocabulary is a list of `{"rank", "token_bytes" (base64), "token_str"}` whose first 256 ranks are the bytes, or a
file of tiktoken's own: lines of base64 and a rank.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.data.model_text import read_text_file
from megatron_retro.data.tokenizers import utf8
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.runtime.strict_json import json_text

_SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MOST_IDS = 1 << 17  # Megatron's size where no --vocab-size is given
_FORM = (
    'a list of {"rank": 0, "token_bytes": "AA==", "token_str": ""} or lines as `AA== 0`, ranks rising from 0, '
    "the 256 bytes first"
)
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s+(?!\S)|\s+"
# where a text is cut before its bytes are merged
_PATTERNS = {
    "v1": rf"{_WORD}+\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|{_SPACES}",
    "v2": rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|"
    + _SPACES,
}


class TikTokenizer:
    """By tiktoken. A special token's name in a text is text."""

    def __init__(self, model: Path, config: TokenizerConfig) -> None:
        try:
            from tiktoken import Encoding
        except ImportError:
            fix = "pip install 'megatron-retro[tiktoken]'"
            raise ConfigError("--tokenizer-type TikTokenizer needs tiktoken", fix=fix) from None
        content = read_text_file(model)
        specials = _special_names(config)
        merges = _ranks(model, content, len(specials))
        self.vocab_size = len(specials) + len(merges)
        self.eod = specials.index("</s>")
        self.specials = {name: number for number, name in enumerate(specials)}
        self.pattern = _PATTERNS[config.tiktoken_pattern]
        self._encoding: Any = Encoding(
            model.name, pat_str=self.pattern, mergeable_ranks=merges, special_tokens=self.specials
        )
        rules = json_text([config.tiktoken_pattern, specials]).encode("utf-8")
        self.fingerprint = hashlib.sha256(b"TikTokenizer" + rules + content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""
        utf8(text)
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; `eod` vanishes, other special tokens show as their names."""
        text: str = self._encoding.decode([int(token) for token in ids if token != self.eod])
        return text


def _special_names(config: TokenizerConfig) -> list[str]:
    """The names of the first ids: those that are given or Megatron's, then fillers."""
    named = list(config.tiktoken_special_tokens or _SPECIALS)
    count = config.tiktoken_num_special_tokens
    absent = [name for name in _SPECIALS if name not in named]
    if absent or len(set(named)) != len(named) or len(named) > count:
        raise ConfigError(
            "--tiktoken-special-tokens does not fit",
            got=f"{len(named)} names ({len(set(named))} different), absent: {' '.join(absent) or 'none'}",
            expected=f"at most {count} (--tiktoken-num-special-tokens) different names with {' '.join(_SPECIALS)}",
        )
    return named + [f"<SPECIAL_{number}>" for number in range(len(named), count)]


def _ranks(path: Path, content: bytes, shift: int) -> dict[bytes, int]:
    """The id of each string of bytes; what is beyond Megatron's number of ids is cut off."""
    try:
        rows = _rows(content)[: _MOST_IDS - shift]
        merges = {base64.b64decode(row, validate=True): shift + number for number, (row, _) in enumerate(rows)}
        ranks = [rank for _, rank in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no tiktoken vocabulary", got=error, expected=_FORM) from None
    in_order = ranks == [*range(len(rows))] and {*[*merges][:256]} == {bytes([one]) for one in range(256)}
    if not in_order or len(merges) != len(rows):
        raise ArtifactError(f"{path} is no tiktoken vocabulary", got="ranks or bytes out of order", expected=_FORM)
    return merges


def _rows(content: bytes) -> list[tuple[str | bytes, int]]:
    """Base64 and rank of every entry."""
    if content.lstrip()[:1] in (b"[", b"{"):
        return [(row["token_bytes"], row["rank"]) for row in json.loads(content)]
    return [(token, int(rank)) for token, rank in (line.split() for line in content.splitlines() if line)]
