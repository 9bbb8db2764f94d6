"""How a conversation becomes a prompt: the template that a model was tuned on, and where passages stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_retro.checkpoint.loading import describe_checkpoint, resolved_from, stored_instructions
from megatron_retro.data.instructions.conversations import Passage, Turn
from megatron_retro.data.instructions.templates import (
    AUTO,
    INSTRUCT_RETRO,
    InstructRetroTemplate,
    Template,
    Tools,
    build_template,
    prompt_of,
    split_passages,
)
from megatron_retro.data.model_text import FOLDER
from megatron_retro.inference.tool_calls import CallForm, form_of

_STOP_STRINGS = ("\n\nUser:", "\n\nSystem:")


@dataclass(frozen=True)
class ChatFormat:
    """Writes prompts with a template; `place` is --context-place of the tuning run."""

    template: Template
    place: str = "encoder"

    @property
    def stops(self) -> tuple[str, ...]:
        """Where an answer ends, besides the end-of-document token: a model may go on as another speaker."""
        return _STOP_STRINGS if isinstance(self.template, InstructRetroTemplate) else ()

    @cached_property
    def calls(self) -> CallForm | None:
        """How the model writes a call of a tool; None where that is not known."""
        return form_of(self.template)

    def write(
        self, turns: Sequence[Turn], passages: Sequence[str] = (), tools: Tools = ()
    ) -> tuple[str, tuple[str, ...]]:
        """The prompt, and the passages that the neighbour encoder reads."""
        in_prompt, to_encoder = split_passages([Passage("", text) for text in passages], self.place)
        return prompt_of(turns, self.template, in_prompt, tools), tuple(passage.text for passage in to_encoder)


def load_chat_format(checkpoint: Path, template: str | None = None) -> ChatFormat:
    """The format of the tuning run unless another template is named; an untuned model reads passages as neighbours."""
    described = describe_checkpoint(checkpoint)
    tuned = stored_instructions(described)
    if template is None:
        template = AUTO if tuned is None else tuned.instruction_template
        if template not in (AUTO, INSTRUCT_RETRO):
            template = str(resolved_from(template, described.path))
    place = "encoder" if tuned is None or tuned.context_place == "none" else tuned.context_place
    return ChatFormat(build_template(template, described.path.parent / FOLDER), place)
