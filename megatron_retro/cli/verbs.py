"""The verbs. Each module of `megatron_retro.cli` named here has

    DESCRIPTION: str                          shown by --help
    SECTIONS: tuple[type, ...]                the configuration that it reads
    POSITIONAL: Positional | None             words without a flag
    run(settings, positional) -> int | None   does it; imports what is heavy inside

and imports nothing heavy itself, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A verb and the module that does it."""

    name: str
    module: str
    summary: str


VERBS: tuple[Verb, ...] = (
    Verb("collect-text", "collect_text", "a corpus from the text that every machine has"),
    Verb("inspect", "inspect", "explain any file or directory of ours: what, made from what, intact or not"),
    Verb("environment", "environment", "what this machine has: versions, devices, optional packages, kernels"),
)
