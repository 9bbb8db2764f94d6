"""What `evaluate perplexity` measured: the figures, their JSON, the page, and the leakage curve as part of any page.

The leakage curve says how much of a model's gain is copying (RETRO, section 2.6): of each held-out chunk, the longest
run of tokens that it shares with a neighbour, over its length; and what the model gains on the chunks that share at
most so much.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_retro.errors import ArtifactError
from megatron_retro.reporting.html import facts, page, paragraph, section, table
from megatron_retro.reporting.plots import Series, line_plot
from megatron_retro.runtime.run_records import EvaluationRecord, HeldOutSamples, RetrievalHealth
from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import from_plain, to_plain

PERPLEXITY_RESULT = "perplexity.json"
VARIANT_HEADER = ("neighbours", "loss", "perplexity", "bits per byte", "costs more than real")


@dataclass(frozen=True)
class VariantFigures:
    """Figures with one variant of neighbours; `excess` is what they cost more than the real ones."""

    loss: Interval
    perplexity: float
    bits_per_byte: float
    excess: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Real neighbours have no `excess`."""
        found = {"loss": self.loss.to_json(), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return found if self.excess is None else {**found, "excess": self.excess.to_json()}


@dataclass(frozen=True)
class LeakageCurve:
    """Bits per byte over the chunks that share at most `alpha` of their length, per variant of neighbours.

    `excess` is what a variant costs more than real neighbours there, in bits per byte, with its interval over
    documents.
    """

    alphas: Sequence[float]
    chunks: Sequence[int]
    bits_per_byte: Mapping[str, Sequence[float]]
    excess: Mapping[str, Sequence[Interval]] = field(default_factory=dict)


@dataclass(frozen=True)
class VerbatimShare:
    """Of held-out chunks, those whose first `length` tokens stand verbatim in another document of the database."""

    length: int
    chunks: int
    found: int
    tokens_read: int
    tokens: int

    def __str__(self) -> str:
        share = f"{self.found / self.chunks:.1%}" if self.chunks else "none"
        looked = "" if self.tokens_read >= self.tokens else f", in {self.tokens_read / self.tokens:.1%} of the database"
        return f"{share} ({self.found} of {self.chunks} chunks begin with {self.length} such tokens{looked})"


@dataclass(frozen=True)
class PerplexityResult:
    """One measurement: figures, what they were measured on, and the leakage curve where there are neighbours."""

    tokens: int
    bytes: int
    variants: Mapping[str, VariantFigures]
    samples: HeldOutSamples
    shortage: float | None = None
    checkpoint: str = ""
    model: str = ""
    data: str = ""
    split: str = ""
    stride: int = 0
    windows: int = 0
    windows_of: int = 0
    leakage: LeakageCurve | None = None
    verbatim: VerbatimShare | None = None

    def to_json(self) -> dict[str, Any]:
        """What stands in perplexity.json."""
        found = {name: to_plain(value) for name, value in vars(self).items()}
        return {name: one for name, one in found.items() if one is not None or name not in ("leakage", "verbatim")}

    def as_evaluation(self) -> EvaluationRecord:
        """In the form of a training run's evaluation, so that studies compare both alike."""
        losses = {name: one.loss for name, one in self.variants.items()}
        excess = {name: one.excess for name, one in self.variants.items() if one.excess is not None}
        return EvaluationRecord(
            step=0,
            seconds=0.0,
            loss=losses["real"].mean,
            tokens=self.tokens,
            samples=self.samples,
            retrieval=RetrievalHealth(losses, excess),
        )


def read_perplexity(path: Path) -> PerplexityResult:
    """The result that a measurement left."""
    try:
        return _decoded(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is no result of evaluate perplexity", got=repr(error), fix="run it again"
        ) from None


def variant_rows(result: PerplexityResult) -> list[tuple[object, ...]]:
    """A row per variant of neighbours, under `VARIANT_HEADER`."""
    return [
        (
            name,
            f"{one.loss.mean:.4f}",
            f"{one.perplexity:.3f}",
            f"{one.bits_per_byte:.4f}",
            "" if one.excess is None else str(one.excess),
        )
        for name, one in result.variants.items()
    ]


def perplexity_page(result: PerplexityResult) -> str:
    """The whole page."""
    shown = {"tokens": result.tokens, "bytes": result.bytes, "stride": result.stride, "split": result.split}
    parts = [
        facts({**shown, "windows": f"{result.windows} of {result.windows_of}", **_verbatim(result)}),
        section("Losses", table(VARIANT_HEADER, variant_rows(result))),
    ]
    if result.leakage is not None:
        parts.append(leakage_section(result.leakage))
    return page("Perplexity", parts, summary=result.checkpoint)


def leakage_sections(run: Path) -> list[str]:
    """The curve that `evaluate perplexity --eval-output RUN/evaluation` left, if it did."""
    path = run / "evaluation" / PERPLEXITY_RESULT
    result = read_perplexity(path) if path.is_file() else None
    if result is None or result.leakage is None:
        return []
    return [facts(_verbatim(result)) + leakage_section(result.leakage)]


def _verbatim(result: PerplexityResult) -> dict[str, object]:
    return {} if result.verbatim is None else {"verbatim in another document": str(result.verbatim)}


def leakage_section(curve: LeakageCurve) -> str:
    """The curve with its table: gains where other neighbours were measured, else bits per byte alone."""
    if not curve.excess:
        series = [Series(name, curve.alphas, bits) for name, bits in curve.bits_per_byte.items()]
        title = "Bits per byte of chunks that share at most this much with their neighbours"
        return section("Leakage", _plot(series, title))
    words = paragraph(
        "Is it copying? Each point holds the held-out chunks whose longest run of tokens in common with a neighbour is "
        "at most so much of the chunk; the last point holds all. A gain on the left is more than copying; one that "
        "comes on the right alone is text that the database holds already."
    )
    series = [Series.with_bounds(name, curve.alphas, costs) for name, costs in curve.excess.items()]
    title = "What other neighbours cost more than the real ones, on chunks that share at most this much with them"
    rows = list(zip(curve.alphas, curve.chunks, *(map(str, costs) for costs in curve.excess.values()), strict=True))
    header = ("share at most", "chunks", *(f"{name} cost" for name in curve.excess))
    return section("Leakage", words, _plot(series, title), table(header, rows))


def _plot(series: Sequence[Series], title: str) -> str:
    return line_plot(series, title=title, x_label="longest shared run / chunk length", y_label="bits per byte")


def _decoded(found: Any) -> PerplexityResult:
    result = from_plain(PerplexityResult, found)
    if "real" not in result.variants:
        raise KeyError("real")
    return result
