"""The published prompts: System, contexts as `title: .., source: ..`, the question, and how its answer begins.

InstructRetro's zero-shot protocol: the top contexts stand in the prompt and are cut to what the sequence leaves;
answers stop at the end of a document or where another speaker begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_retro.data.instructions.conversations import Passage, Turn
from megatron_retro.data.instructions.templates import InstructRetroTemplate, prompt_of
from megatron_retro.evaluation.examples import Example

STOP_STRINGS = ("User:", "System:", "Assistant:")
Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]


class Form(Enum):
    """What kind of answer is asked for: the words put before the question, and those that the answer begins with."""

    SHORT = ("Answer the following question with a short span. ", " The answer is")
    LONG = ("Please give a full and complete answer for the question. ", "")
    TRUE_FALSE = ("Answer the following question with True or False. ", "")
    CHOICE = ("Answer the following question by selecting one of the provided options. ", "")
    TALK = ("", "")

    @property
    def request(self) -> str:
        return self.value[0]

    @property
    def opening(self) -> str:
        """How the answer begins."""
        return self.value[1]


@dataclass(frozen=True)
class Prompt:
    """The text to go on from, and the passages that the neighbour encoder may read beside it."""

    text: str
    passages: tuple[str, ...]


def option_letters(count: int) -> list[str]:
    """A, B, C, ..."""
    return [chr(ord("A") + number) for number in range(count)]


def asked(example: Example, form: Form) -> str:
    """The user's turn."""
    question = example.question
    if example.options:
        listed = [
            f"({letter}) {text}"
            for letter, text in zip(option_letters(len(example.options)), example.options, strict=True)
        ]
        question += "\nChoose one based on the following options: " + " ".join(listed)
    return form.request + question


def build_prompt(
    example: Example,
    form: Form,
    contexts: Sequence[Passage],
    *,
    num_contexts: int,
    encoder_contexts: int,
    budget: int,
    encode: Encode,
    decode: Decode,
) -> Prompt:
    """The prompt in at most `budget` tokens; contexts that do not fit are cut at their end, in order."""
    shown = tuple(contexts[:num_contexts])
    used = len(encode(_written(example, form, ())))
    room = max(0, budget - used - len(shown))
    kept: list[Passage] = []
    for passage in shown:
        cut = cut_passage(passage, room, encode, decode)
        if cut is None:
            break
        kept.append(cut)
        room -= len(encode("\n\n" + cut.rendered()))
    passages = tuple(passage.rendered() for passage in contexts[:encoder_contexts])
    return Prompt(_written(example, form, kept), passages)


def cut_passage(passage: Passage, room: int, encode: Encode, decode: Decode) -> Passage | None:
    """The passage cut to `room` tokens with its title; None when not even the title fits."""
    whole = len(encode("\n\n" + passage.rendered()))
    if whole <= room:
        return passage
    tokens = encode(passage.text)
    left = len(tokens) - (whole - room)
    while left > 0:
        cut = Passage(passage.title, decode(tokens[:left]).rstrip("�"))
        excess = len(encode("\n\n" + cut.rendered())) - room
        if excess <= 0:
            return cut
        left -= excess
    return None


def _written(example: Example, form: Form, passages: Sequence[Passage]) -> str:
    turns = [Turn(role.lower(), text) for role, text in example.history]
    turns.append(Turn("user", asked(example, form)))
    return prompt_of(turns, InstructRetroTemplate(), passages) + form.opening
