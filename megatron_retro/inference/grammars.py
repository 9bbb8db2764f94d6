"""Answers that are JSON or call a tool, whatever the model would like to write: llguidance says which tokens may come
next.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_retro.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer, end_tokens
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.runtime.strict_json import json_text

_COMPACT = {"whitespace_flexible": False}  # spaces without end are JSON, too
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_KEPT_GRAMMARS = 32
_LARGEST_SCHEMA = 128 << 10


class Constraint:
    """Follows one answer."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, count: int) -> Tensor:
        """Which of the first `count` ids may come next."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.zeros(count, dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits[:count].astype(bool))
        return allowed

    def consume(self, token: int) -> None:
        """Take the token that was sampled."""
        if not self._matcher.consume_token(token):
            raise DataError(
                "the answer cannot be held to what was asked for",
                got=self._matcher.get_error() or f"token {token}",
                fix="ask for a simpler schema",
            )


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise ConfigError("response_format needs llguidance", fix="pip install 'megatron-retro[serve]'") from None
        self._matcher: Any = llguidance.LLMatcher
        self._encode = tokenizer.encode
        self._compiled = lru_cache(_KEPT_GRAMMARS)(self._compile)
        ends, backend = sorted(end_tokens(tokenizer)), getattr(tokenizer, "backend", None)
        given = backend.to_str() if backend is not None else llguidance.TokenizerWrapper(_described(tokenizer))
        self._tokenizer: Any = llguidance.LLTokenizer(given, n_vocab=tokenizer.vocab_size, eos_token=ends)

    def require(self, schema: Mapping[str, Any]) -> str:
        """The grammar of a JSON schema, refused in words: a large one takes half a second, in any thread."""
        size = len(json_text(schema))
        if size > _LARGEST_SCHEMA:
            raise ConfigError(
                "response_format has a schema that is too large",
                got=f"{size:,} characters",
                expected=f"at most {_LARGEST_SCHEMA:,}",
            )
        try:
            grammar: str = self._matcher.grammar_from_json_schema(dict(schema), overrides=_COMPACT)
        except ValueError as error:
            raise ConfigError("response_format holds no JSON schema", got=error) from None
        return self.require_grammar(grammar, "response_format")

    def require_grammar(self, grammar: str, field: str) -> str:
        """A grammar of llguidance that a field of a request led to, refused in words as well."""
        if len(grammar) > 2 * _LARGEST_SCHEMA:
            raise ConfigError(f"{field} is too large", got=f"{len(grammar):,} characters")
        try:
            self._compiled(grammar)
        except ValueError as error:
            raise ConfigError(f"{field} has a schema that is not followed here", got=error) from None
        return grammar

    def token_of(self, text: str) -> int | None:
        """The token that is this text."""
        ids = self._encode(text)
        return ids[0] if len(ids) == 1 else None

    def begin(self, grammar: str) -> Constraint:
        """Follow a new answer."""
        return Constraint(self._compiled(grammar).deep_copy())

    def _compile(self, grammar: str) -> Any:
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher


def _described(tokenizer: Any) -> SimpleNamespace:
    """The bytes of each id; none for tokens that are no text."""
    if isinstance(tokenizer, ByteTokenizer):
        tokens = [*(bytes([byte]) for byte in range(256)), b""]
    elif isinstance(tokenizer, SentencePieceTokenizer):
        tokens = [_piece(tokenizer.processor, token) for token in range(tokenizer.vocab_size)]
    else:
        raise ConfigError(f"response_format is not followed with a {type(tokenizer).__name__}", fix="leave it out")
    specials = [token for token, content in enumerate(tokens) if not content]

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text))

    class Described(SimpleNamespace):
        __call__ = staticmethod(encode)

    return Described(eos_token_id=tokenizer.eod, bos_token_id=None, tokens=tokens, special_token_ids=specials)


def _piece(processor: Any, token: int) -> bytes:
    if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
        return b""
    name: str = processor.id_to_piece(token)
    return bytes([int(name[3:5], 16)]) if processor.is_byte(token) else name.replace(_SPACE, " ").encode()
