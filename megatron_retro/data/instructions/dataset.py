"""The rows of an instruction tuning run: files blended, conversations tokenized once, rows laid out per epoch.

The k-th row is a pure function of the settings, the files and k, like the k-th sample of pretraining.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_retro.data.blends import Blend, parse_data_path
from megatron_retro.data.instructions.conversations import Conversation, read_conversations
from megatron_retro.data.instructions.rows import Buckets, RowShape, build_batch, pack
from megatron_retro.data.instructions.templates import ConversationTokenizer, TokenizedConversation
from megatron_retro.data.order import key_of, permuted
from megatron_retro.errors import DataError
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.runtime.console import warn

_LONG_SHOWN = 10


@dataclass(frozen=True, eq=False)
class InstructionDataset:
    """Rows of conversations. An epoch takes as many conversations of each file as its weight says."""

    files: tuple[tuple[TokenizedConversation, ...], ...]
    blend: Blend
    shape: RowShape
    seed: int
    packed: bool
    buckets: Buckets | None = None

    @property
    def seq_length(self) -> int:
        """Tokens of a row."""
        return self.shape.length

    @property
    def num_samples(self) -> int:
        """Rows of the first epoch."""
        return len(self._epoch_rows(0))

    @cached_property
    def num_conversations(self) -> int:
        """Conversations of one epoch."""
        return sum(len(file) for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that the k-th row depends on."""
        digest = hashlib.sha256(repr((self.blend.weights, self.shape, self.seed, self.packed)).encode())
        if self.buckets is not None:
            digest.update(repr(self.buckets).encode())
        for file in self.files:
            for example in file:
                digest.update(example.tokens.tobytes() + example.learned.tobytes())
                for passage in example.passages:
                    digest.update(b"passage" + passage.tobytes())
        return digest.hexdigest()

    @property
    def inputs(self) -> dict[str, str]:
        """One fingerprint for all conversations: they are read whole."""
        return {"conversations": self.fingerprint}

    def read(self, numbers: Sequence[int]) -> Microbatch[Array]:
        """The rows of the given numbers of the run."""
        rows = [self._row(int(number)) for number in numbers]
        if self.buckets is None:
            return build_batch(rows, numbers, self.shape)
        blocks = {int(number) // self.buckets.size for number in numbers}
        longest = max(self._block_length(block) for block in blocks)
        return build_batch(rows, numbers, self.shape, self.buckets.row_length(longest, self.shape.length))

    def documents(self, numbers: Sequence[int]) -> None:
        """A row holds conversations of its own."""

    def _block_length(self, block: int) -> int:
        """The longest row of a block."""
        size = 0 if self.buckets is None else self.buckets.size
        if block not in self._block_lengths:
            rows = (self._row(number) for number in range(block * size, (block + 1) * size))
            self._block_lengths[block] = max(sum(map(self.shape.span, row)) for row in rows)
        return self._block_lengths[block]

    @cached_property
    def _block_lengths(self) -> dict[int, int]:
        return {}

    def _row(self, number: int) -> list[TokenizedConversation]:
        epoch = 0
        while number >= len(rows := self._epoch_rows(epoch)):
            number -= len(rows)
            epoch += 1
        return [self._conversation(place) for place in rows[number]]

    def _conversation(self, place: int) -> TokenizedConversation:
        """The conversation at a place of the blended order, each file shuffled anew in each of its own epochs."""
        source, draw = self.blend.locate(place)
        file = self.files[source]
        epoch, position = divmod(draw, len(file))
        key = key_of(self.seed, source, epoch)
        return file[int(permuted(np.array([position]), len(file), key)[0])]

    @cached_property
    def _epochs(self) -> dict[int, list[tuple[int, ...]]]:
        return {}

    def _epoch_rows(self, epoch: int) -> list[tuple[int, ...]]:
        if epoch not in self._epochs:
            self._epochs[epoch] = self.lay_out_epoch(epoch)
        return self._epochs[epoch]

    def lay_out_epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """Rows of an epoch as places of the blended order; packed rows and buckets come in a shuffled order."""
        places = range(epoch * self.num_conversations, (epoch + 1) * self.num_conversations)
        if not self.packed and self.buckets is None:
            return [(place,) for place in places]
        spans = [self.shape.span(self._conversation(place)) for place in places]
        rows = pack(spans, self.shape.length) if self.packed else [(index,) for index in range(len(places))]
        key = key_of(self.seed, len(self.files), epoch)
        if self.packed:
            rows = [rows[index] for index in permuted(np.arange(len(rows)), len(rows), key)]
        if self.buckets is not None:
            lengths = [sum(spans[index] for index in row) for row in rows]
            first = sum(len(self._epoch_rows(earlier)) for earlier in range(epoch))
            rows = [rows[index] for index in self.buckets.arranged(lengths, first, key_of(key, 1))]
        return [tuple(places[index] for index in row) for row in rows]


def open_instructions(
    words: Sequence[str],
    encoder: ConversationTokenizer,
    shape: RowShape,
    *,
    seed: int,
    packed: bool,
    skip_long: bool,
    buckets: Buckets | None = None,
    vocab_size: int | None = None,
) -> InstructionDataset:
    """Read and tokenize the files of a blend; conversations longer than a row are refused, or left out when asked."""
    paths = parse_data_path(words, "--instruction-data")
    files = []
    for weighted in paths:
        path = Path(weighted.path)
        examples = [_tokenized(encoder, conversation) for conversation in read_conversations(path)]
        _require_known_tokens(examples, vocab_size)
        files.append(_fitting(path, examples, shape, skip_long))
    return InstructionDataset(tuple(files), Blend(tuple(path.weight for path in paths)), shape, seed, packed, buckets)


def _tokenized(encoder: ConversationTokenizer, conversation: Conversation) -> TokenizedConversation:
    """The tokens of a conversation; a template that cannot write it is named with the line."""
    try:
        return encoder.encode(conversation)
    except DataError as error:
        what = f"{conversation.origin}: {error.what}"
        raise DataError(what, got=error.got, expected=error.expected, fix=error.fix) from None


def _require_known_tokens(conversations: Sequence[TokenizedConversation], vocab_size: int | None) -> None:
    """Refuse a tokenizer that gives ids which the model does not have."""
    for conversation in conversations if vocab_size is not None else ():
        highest = max(int(ids.max()) for ids in (conversation.tokens, *conversation.passages) if len(ids))
        if vocab_size is not None and highest >= vocab_size:
            raise DataError(
                f"{conversation.origin} holds a token beyond the model's vocabulary",
                got=highest,
                expected=f"0 to {vocab_size - 1}",
                fix="give the tokenizer that the model was trained with (--tokenizer-type, --tokenizer-model)",
            )


def _fitting(
    path: Path, examples: Sequence[TokenizedConversation], shape: RowShape, skip_long: bool
) -> tuple[TokenizedConversation, ...]:
    fitting = tuple(example for example in examples if shape.span(example) <= shape.length)
    long = [example for example in examples if shape.span(example) > shape.length]
    if not long:
        return fitting
    shown = ", ".join(f"{example.origin} ({shape.span(example)} tokens)" for example in long[:_LONG_SHOWN])
    more = f" and {len(long) - _LONG_SHOWN} more" if len(long) > _LONG_SHOWN else ""
    if not skip_long or not fitting:
        raise DataError(
            f"{len(long)} of {len(examples)} conversations of {path} are longer than a row",
            got=shown + more,
            expected=f"at most --seq-length {shape.length}, padding to chunks included",
            fix="raise --seq-length, or lower --num-contexts"
            + ("; --skip-long-examples passes over them" if fitting else ""),
        )
    warn(f"{len(long)} of {len(examples)} conversations of {path} are longer than a row and passed over: {shown}{more}")
    return fitting
