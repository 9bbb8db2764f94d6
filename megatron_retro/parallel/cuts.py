"""The table of cuts: how every parameter lies on the tensor ranks, and where the residual stream is gathered.

One table serves the cut, the checkpoint and the export. A pattern is a parameter's path with `*` for one component. The
styles:

    COLUMN      cut by its output (heads, feed-forward width), so each rank computes its own
    ROW         cut by its input; the product is this rank's part of a sum
    VOCABULARY  cut by rows of the padded vocabulary
    HEADS       whole on every rank, used by each for its own heads: its gradient is always a part of a sum
    STREAM      whole on every rank, used on the residual stream: its gradient is a part of a sum only where the stream
                is cut (sequence parallelism), else it is the same on all ranks
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache


class Style(Enum):
    """How a parameter lies on the tensor ranks."""

    COLUMN = "column"
    ROW = "row"
    VOCABULARY = "vocabulary"
    HEADS = "heads"
    STREAM = "stream"


@dataclass(frozen=True)
class Cut:
    """One row: which parameters, which style, which dimension is cut (None = whole)."""

    pattern: str
    style: Style
    dim: int | None = None

    @property
    def whole(self) -> bool:
        """The same on every tensor rank."""
        return self.dim is None

    def partial_gradient(self, sequence_parallel: bool) -> bool:
        """Whether ranks hold different parts of the gradient of a parameter that is the same on all."""
        return self.style is Style.HEADS or (self.style is Style.STREAM and sequence_parallel)


_LAYER = "{layers,encoder.layers}.*"
_ATTENTION = _LAYER + ".{attention,cross_attention}"
_INTO_HEADS = _ATTENTION + ".{query_key_value,query,key_value}"
_CLOSING = _LAYER + ".{attention.output,cross_attention.output,mlp.down}"

CUTS: tuple[Cut, ...] = (
    Cut("{embedding,encoder.embedding}.word.weight", Style.VOCABULARY, 0),
    Cut("{embedding,encoder.embedding}.position.weight", Style.STREAM),
    Cut(_LAYER + ".attention.query_key_value.{weight,bias}", Style.COLUMN, 0),
    Cut(_LAYER + ".cross_attention.{query,key_value}.{weight,bias}", Style.COLUMN, 0),
    Cut("layers.*.cross_attention.attending.bias", Style.HEADS),
    Cut(_ATTENTION + ".relative.projection.weight", Style.COLUMN, 0),
    Cut(_ATTENTION + ".{query_norm,key_norm}.{weight,bias}", Style.HEADS),
    Cut(_ATTENTION + ".{query_norm,key_norm}.heads", Style.COLUMN, 0),
    Cut("layers.*.cross_attention.gate.heads", Style.COLUMN, 0),
    Cut("layers.*.cross_attention.gate.{weight,bias,value}", Style.HEADS),
    Cut(_ATTENTION + ".output.weight", Style.ROW, 1),
    Cut(_ATTENTION + ".output.bias", Style.STREAM),
    Cut(_LAYER + ".mlp.up.weight", Style.COLUMN, -2),
    Cut(_LAYER + ".mlp.up.bias", Style.COLUMN, -1),
    Cut(_LAYER + ".mlp.down.weight", Style.ROW, 1),
    Cut(_LAYER + ".mlp.down.bias", Style.STREAM),
    Cut(_LAYER + ".{input_norm,post_attention_norm,cross_norm,mlp_norm,post_mlp_norm}.{weight,bias}", Style.STREAM),
    Cut("{final_norm,encoder.final_norm}.{weight,bias}", Style.STREAM),
    Cut(_INTO_HEADS + ".lora.down.weight", Style.HEADS),
    Cut(_INTO_HEADS + ".lora.up.weight", Style.COLUMN, 0),
    Cut(_LAYER + ".mlp.up.lora.down.weight", Style.HEADS),
    Cut(_LAYER + ".mlp.up.lora.up.weight", Style.COLUMN, -2),
    Cut(_CLOSING + ".lora.down.weight", Style.ROW, 1),
    Cut(_CLOSING + ".lora.up.weight", Style.HEADS),
    Cut(_ATTENTION + ".{query_key_value,key_value}.ia3.weight", Style.COLUMN, 0),
    Cut(_LAYER + ".mlp.down.ia3.weight", Style.COLUMN, 0),
    Cut(_LAYER + ".{attention,mlp}.adapter.{down,up}.{weight,bias}", Style.STREAM),
    Cut("embedding.prompt.{table,up,down}.{weight,bias}", Style.STREAM),
    Cut("output.weight", Style.VOCABULARY, 0),
)


@dataclass(frozen=True)
class Region:
    """A module whose first argument is gathered and whose result is reduced.

    `opening` and `closing` are the leaves that multiply what is gathered, and give what is reduced.
    """

    pattern: str
    opening: str
    closing: str


REGIONS: tuple[Region, ...] = (
    Region(_LAYER + ".attention", "query_key_value", "output"),
    Region(_LAYER + ".cross_attention", "query", "output"),
    Region(_LAYER + ".mlp", "up", "down"),
)


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    """`a.*.{b,c}` as a regular expression over whole paths."""
    parts = re.split(r"(\*|\{[^}]*\})", pattern)
    texts = [
        "[^.]+"
        if part == "*"
        else "(?:" + "|".join(map(re.escape, part[1:-1].split(","))) + ")"
        if part[:1] == "{"
        else re.escape(part)
        for part in parts
    ]
    return re.compile("".join(texts))


def matches(pattern: str, path: str) -> bool:
    """Whether a path is what a pattern describes."""
    return _expression(pattern).fullmatch(path) is not None


def cut_of(name: str, cuts: Sequence[Cut] = CUTS) -> Cut:
    """The one row for a parameter; a parameter without a row, or with two, is a fault of ours."""
    found = [cut for cut in cuts if matches(cut.pattern, name)]
    if len(found) != 1:
        raise LookupError(f"{name} matches {len(found)} rows of the table of cuts: {[cut.pattern for cut in found]}")
    return found[0]


def regions_of(paths: Iterable[str]) -> dict[str, Region]:
    """Which of these module paths are regions."""
    return {path: region for path in paths for region in REGIONS if matches(region.pattern, path)}
