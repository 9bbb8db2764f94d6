"""Conversations become rows whose loss, borders and passages are exactly what a slow reading says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_retro.config.model import RetroConfig
from megatron_retro.data.instructions.conversations import Conversation, Passage, Turn, read_conversations
from megatron_retro.data.instructions.dataset import InstructionDataset, open_instructions
from megatron_retro.data.instructions.rows import Buckets, RowShape, build_batch, pack
from megatron_retro.data.instructions.templates import (
    INSTRUCT_RETRO_SYSTEM,
    ConversationTokenizer,
    InstructRetroTemplate,
    TokenizedConversation,
    prompt_of,
)
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.testing.tiny_models import random_model, tiny_model, tiny_retro

TOKENIZER = ByteTokenizer()


def random_conversation(chance: random.Random) -> Conversation:
    def word() -> str:
        return "x" + "".join(chance.choices("abcdé ", k=chance.randrange(9))) + "x"

    turns = [Turn("system", word())] if chance.random() < 0.5 else []
    for _ in range(chance.randrange(1, 4)):
        turns += [Turn("user", word()), Turn("assistant", word())]
    passages = tuple(Passage(word() if chance.random() < 0.7 else "", word()) for _ in range(chance.randrange(4)))
    return Conversation(tuple(turns), passages)


def written_by_hand(
    conversation: Conversation, passages: tuple[Passage, ...], every_reply: bool
) -> list[tuple[int, bool]]:
    """(byte, learned) of the published form, one character after another."""
    turns = list(conversation.turns)
    system = turns.pop(0).text if turns[0].role == "system" else INSTRUCT_RETRO_SYSTEM
    out = [(byte, False) for byte in f"System: {system}".encode()]
    for passage in passages:
        text = f"title: {passage.title}, source: {passage.text}" if passage.title else passage.text
        out += [(byte, False) for byte in f"\n\n{text}".encode()]
    for number in range(0, len(turns), 2):
        final = number == len(turns) - 2
        out += [(byte, False) for byte in f"\n\nUser: {turns[number].text}\n\nAssistant:".encode()]
        out += [(byte, final or every_reply) for byte in f" {turns[number + 1].text}".encode()]
    return [*out, (TOKENIZER.eod, True)]


@pytest.mark.parametrize("every_reply", [False, True])
def test_loss_mask_equals_the_hand_written_form(every_reply: bool) -> None:
    chance = random.Random(11)
    for _ in range(200):
        conversation = random_conversation(chance)
        encoder = ConversationTokenizer(TOKENIZER, InstructRetroTemplate(), "prompt", 5, every_reply)
        example = encoder.encode(conversation)
        expected = written_by_hand(conversation, conversation.passages, every_reply)
        assert example.tokens.tolist() == [token for token, _ in expected]
        assert example.learned.tolist() == [learned for _, learned in expected]
        prompt = prompt_of(conversation.turns[:-1], encoder.template, conversation.passages)
        assert TOKENIZER.encode(prompt) == example.tokens[: example.prompt_length].tolist()


@pytest.mark.parametrize(
    ("place", "in_prompt", "to_encoder"),
    [("prompt", 3, 0), ("encoder", 0, 3), ("split", 1, 2), ("none", 0, 0)],
)
def test_passages_go_where_they_are_asked(place: str, in_prompt: int, to_encoder: int) -> None:
    passages = tuple(Passage(f"t{number}", f"text {number}") for number in range(4))
    conversation = Conversation((Turn("user", "q"), Turn("assistant", "a")), passages)
    encoder = ConversationTokenizer(TOKENIZER, InstructRetroTemplate(), place, 3)
    example = encoder.encode(conversation)
    text = TOKENIZER.decode(example.tokens.tolist())
    assert [f"text {number}" in text for number in range(4)] == [number < in_prompt for number in range(4)]
    assert [TOKENIZER.decode(passage.tolist()) for passage in example.passages] == [
        passage.rendered() for passage in passages[in_prompt : in_prompt + to_encoder]
    ]


def example_of(prompt: int, reply: int, passages: tuple[int, ...] = (), start: int = 0) -> TokenizedConversation:
    tokens = np.arange(start, start + prompt + reply, dtype=np.int32)
    learned = np.arange(prompt + reply) >= prompt
    return TokenizedConversation(
        tokens, learned, prompt, tuple(np.full(length, 7, dtype=np.int32) for length in passages), "here"
    )


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=12))
def test_packed_rows_hold_every_example_apart(sizes: list[tuple[int, int, int]]) -> None:
    shape = RowShape(128, 99, chunk_length=8, num_neighbors=2, retrieved_length=16)
    examples = [example_of(prompt, reply, (passage,)) for prompt, reply, passage in sizes]
    rows = pack([shape.span(example) for example in examples], shape.length)
    assert sorted(number for row in rows for number in row) == list(range(len(examples)))
    for row in rows:
        batch = build_batch([[examples[number] for number in row]], [0], shape)
        assert batch.neighbors is not None and batch.document_ids_BS is not None
        documents = batch.document_ids_BS[0]
        for place, number in enumerate(row):
            example = examples[number]
            where = np.flatnonzero(documents == 3 * place + 2)
            assert batch.tokens_BS[0, where].tolist() == example.tokens[:-1].tolist()
            assert batch.labels_BS[0, where].tolist() == example.tokens[1:].tolist()
            assert batch.loss_mask_BS[0, where].tolist() == example.learned[1:].tolist()
            assert (where[0] + example.prompt_length) % 8 == 0, "the prompt ends on a chunk boundary"
        assert batch.loss_mask_BS.sum() == sum(examples[number].learned[1:].sum() for number in row)
        readers = readers_of_each_chunk(documents, 8)
        for chunk, mask in enumerate(batch.neighbors.mask_BCKR[0]):
            if mask.any():
                assert len(readers[chunk]) == 1, "a chunk's passages are read by one example alone"


def readers_of_each_chunk(documents: np.ndarray, chunk_length: int) -> list[set[int]]:
    """Which examples' tokens may read each chunk's neighbours: those from the chunk's last token on, m of them."""
    found = []
    for chunk in range(len(documents) // chunk_length):
        first = (chunk + 1) * chunk_length - 1
        readers = documents[first : first + chunk_length]
        found.append({(int(document) - 1) // 3 for document in readers if document})
    return found


def test_a_passage_never_leaves_its_slot() -> None:
    shape = RowShape(32, 0, chunk_length=8, num_neighbors=2, retrieved_length=16)
    batch = build_batch([[example_of(10, 5, (40, 3))]], [4], shape)
    assert batch.neighbors is not None
    assert batch.neighbors.mask_BCKR.sum(-1).tolist() == [[[16, 3], [16, 3], [0, 0], [0, 0]]]
    assert batch.sample_ids_B.tolist() == [4]


def test_rows_must_hold_whole_chunks() -> None:
    with pytest.raises(ConfigError, match="multiple of --retro-chunk-length 8"):
        RowShape(30, 0, chunk_length=8)


def test_three_forms_are_read(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answers": ["a", "b"], "contexts": [{"title": "t", "text": "c"}, "plain"]},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    found = read_conversations(path)
    assert {conversation.turns for conversation in found} == {(Turn("user", "q"), Turn("assistant", "a"))}
    assert found[2].passages == (Passage("t", "c"), Passage("", "plain"))
    assert found[2].origin == f"{path}:3"


BAD = [
    ("{", "not JSON (column "),
    ("[1]", "expected an object, got list"),
    ('{"text": "x"}', "expected messages, conversations, prompt and completion, "),
    ('{"messages": [{"role": "user", "content": "q"}]}', "no assistant turn"),
    ('{"messages": [{"role": "robot", "content": "q"}]}', "unknown role 'robot'"),
    ('{"messages": [{"role": "user"}]}', "content must be text, got NoneType"),
    ('{"messages": [{"role":"assistant","content":"a"},{"role":"user","content":"q"}]}', "the last turn is the user's"),
    ('{"messages": [{"role":"user","content":"a"},{"role":"system","content":"q"},'
     '{"role":"assistant","content":"a"}]}', "a system turn may only come first"),
    ('{"prompt": "q", "completion": " "}', "the last assistant turn is empty"),
    ('{"question": "q", "answers": []}', "answers must be a list of texts"),
    ('{"question": "q", "answers": ["a"], "contexts": []}', "contexts must be a list with at least one"),
    ('{"question": "q", "answers": ["a"], "contexts": [{"text": " "}]}', "a context is empty"),
]  # fmt: skip


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(line for line, _ in BAD))
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    for number, (_, reason) in enumerate(BAD, 1):
        assert f"line {number}: {reason}" in str(caught.value)


def test_files_without_content_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no conversation"):
        read_conversations(empty)
    with pytest.raises(DataError, match="there is no file"):
        read_conversations(tmp_path / "absent.jsonl")


def dataset_of(tmp_path: Path, *, packed: bool, seq_length: int = 512, skip_long: bool = False) -> InstructionDataset:
    chance = random.Random(2)
    words = []
    for name, count in (("a", 30), ("b", 10)):
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as stream:
            for _ in range(count):
                conversation = random_conversation(chance)
                messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
                stream.write(json.dumps({"messages": messages}) + "\n")
        words += ["3" if name == "a" else "1", str(path)]
    encoder = ConversationTokenizer(TOKENIZER, InstructRetroTemplate())
    shape = RowShape(seq_length, TOKENIZER.eod)
    return open_instructions(words, encoder, shape, seed=4, packed=packed, skip_long=skip_long)


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_reads_every_conversation_as_its_weight_says(tmp_path: Path, packed: bool) -> None:
    dataset = dataset_of(tmp_path, packed=packed, seq_length=1024)
    rows = dataset.lay_out_epoch(0)
    assert sorted(place for row in rows for place in row) == list(range(40))
    assert len(rows) < 40 if packed else len(rows) == 40
    batch = dataset.read(range(len(rows)))
    whole = sum(int(example.learned[1:].sum()) for file in dataset.files for example in file)
    assert batch.loss_mask_BS.sum() == whole
    assert dataset.lay_out_epoch(1) != rows


def test_rows_are_a_function_of_their_number(tmp_path: Path) -> None:
    dataset, again = dataset_of(tmp_path, packed=True), dataset_of(tmp_path, packed=True)
    assert dataset.fingerprint == again.fingerprint
    far = dataset.num_samples + 3
    together, alone = dataset.read([1, far]), again.read([far])
    assert np.array_equal(together.tokens_BS[1], alone.tokens_BS[0])
    assert dataset.fingerprint != dataset_of(tmp_path, packed=False).fingerprint


def test_long_conversations_are_named_or_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"longer than a row(.|\n)*a\.jsonl:\d+ \(\d+ tokens\)"):
        dataset_of(tmp_path, packed=False, seq_length=320)
    dataset = dataset_of(tmp_path, packed=False, seq_length=340, skip_long=True)
    assert "passed over" in capsys.readouterr().err
    assert 0 < dataset.num_conversations < 40


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_like_length_come_together(tmp_path: Path, packed: bool) -> None:
    """Every conversation once per epoch, a block's rows in one length that holds them, and far fewer positions."""
    plain = dataset_of(tmp_path, packed=packed, seq_length=1024)
    bucketed = dataclasses.replace(plain, buckets=Buckets(4, 8))
    assert bucketed.fingerprint != plain.fingerprint
    positions, count = 0, 3 * bucketed.num_samples
    for block in range(count // 4):
        numbers = range(4 * block, 4 * block + 4)
        batch = bucketed.read(numbers)
        length = batch.tokens_BS.shape[1]
        positions += batch.tokens_BS.size
        for number in numbers:  # one at a time, as another cluster reads them, from a dataset that read nothing yet
            alone = dataclasses.replace(bucketed).read([number])
            assert np.array_equal(alone.tokens_BS[0], batch.tokens_BS[number - 4 * block])
        assert length % 8 == 0 and length - 1024 // 8 < max(np.flatnonzero(row).max() for row in batch.document_ids_BS)
    for epoch in range(3):
        places = [place for row in bucketed.lay_out_epoch(epoch) for place in row]
        assert sorted(places) == list(range(40 * epoch, 40 * epoch + 40))
    assert positions < 0.8 * count // 4 * 4 * 1024 or packed


@given(
    lengths=st.lists(st.integers(1, 64), max_size=60),
    size=st.integers(1, 7),
    first=st.integers(0, 20),
    key=st.integers(0),
)
def test_buckets_are_a_permutation_in_whole_blocks(lengths: list[int], size: int, first: int, key: int) -> None:
    order = Buckets(size, 1).arranged(lengths, first, key)
    assert sorted(order) == list(range(len(lengths)))
    head = -first % size
    blocks = [order[start : start + size] for start in range(head, len(order) - size + 1, size)]
    if len(lengths) <= 32 * size:  # one window: no length of another block lies between two of a block
        ranges = sorted((min(lengths[row] for row in block), max(lengths[row] for row in block)) for block in blocks)
        assert all(low >= high for (_, high), (low, _) in itertools.pairwise(ranges))


def test_lengths_are_eighths_that_divide() -> None:
    buckets = Buckets(4, 8)
    assert {buckets.row_length(longest, 512) for longest in range(1, 513)} == set(range(64, 513, 64))
    assert buckets.row_length(33, 40) == 40 and buckets.row_length(3, 40) == 8


@pytest.mark.parametrize("kind", ["gpt", "retro"])
def test_no_example_sees_another_in_a_packed_row(kind: str) -> None:
    """Other tokens and other passages of one example change no bit of what the model says to the others."""
    module = random_model(tiny_model(vocab_size=64), tiny_retro() if kind == "retro" else RetroConfig())
    chunks = {"chunk_length": 4, "num_neighbors": 2, "retrieved_length": 8} if kind == "retro" else {}
    shape = RowShape(64, 0, **chunks)
    examples = [example_of(9, 6, (8, 5), 1), example_of(5, 9, (7,), 20), example_of(11, 3, (8, 8), 40)]
    changed = dataclasses.replace(
        examples[1], tokens=examples[1].tokens[::-1].copy(), passages=(np.full(3, 9, dtype=np.int32),)
    )

    def logits(row: list[TokenizedConversation]) -> tuple[torch.Tensor, np.ndarray]:
        batch = build_batch([row], [0], shape).to(torch.device("cpu"))
        with torch.no_grad():
            found = module(
                batch.tokens_BS,
                batch.neighbors,
                position_ids_BS=batch.position_ids_BS,
                document_ids_BS=batch.document_ids_BS,
            )
        assert batch.document_ids_BS is not None
        return found[0], batch.document_ids_BS[0].numpy()

    before, documents = logits(examples)
    after, _ = logits([examples[0], changed, examples[2]])
    own = documents == 3 + 2
    others = (documents == 2) | (documents == 6 + 2)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[own], after[own])
    if kind == "retro":
        unread = dataclasses.replace(examples[0], passages=())
        told, _ = logits([unread, *examples[1:]])
        assert not torch.equal(told[documents == 2], before[documents == 2]), "its own passages are read"
        assert torch.equal(told[documents == 5], before[documents == 5])
