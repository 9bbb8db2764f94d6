"""`megatron-retro retrieve-contexts`: passages of an index for conversations to train on."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.data import ContextsConfig
from megatron_retro.config.inference import LiveRetrievalConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ConfigError

DESCRIPTION = """Copy SOURCE, a file of conversations or questions (JSON lines), to TARGET with passages filled in.

They come from --retro-index, a project of build-retrieval: for each conversation the chunks nearest to what the user
said last. Train on TARGET with `finetune --context-place prompt`, `encoder` or `split`; the trainer does not search."""
SECTIONS: tuple[type, ...] = (ContextsConfig, LiveRetrievalConfig)
POSITIONAL: Positional | None = Positional("paths", "*", "SOURCE TARGET")


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Search and write."""
    from pathlib import Path

    from megatron_retro.retrieval.conversation_contexts import write_contexts
    from megatron_retro.retrieval.live_index import LiveIndex
    from megatron_retro.runtime.console import say

    project = settings[LiveRetrievalConfig].retro_index
    if len(positional) != 2:
        raise ConfigError(
            "retrieve-contexts takes two paths", got=" ".join(positional) or "none", expected="SOURCE TARGET"
        )
    if project is None:
        raise ConfigError("where are the passages?", expected="--retro-index DIR", fix="make one with build-retrieval")
    target = Path(positional[1])
    read, searched = write_contexts(Path(positional[0]), target, LiveIndex(project), settings[ContextsConfig])
    say(f"{target}: {read} conversations, passages searched for {searched} of them")
