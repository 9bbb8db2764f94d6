"""Which text of this machine becomes a corpus."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class CollectConfig:
    """Text of this machine as a corpus"""

    collect_output: str | None = option(None, "folder for train.jsonl and held_out.jsonl", ours=True)
    collect_held_out: float = option(0.06, "share of documents held out", minimum=0.0, maximum=1.0, ours=True)
