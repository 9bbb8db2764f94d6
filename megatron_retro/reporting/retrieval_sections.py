"""What retrieval did, as parts of a page: what other neighbours cost, where neighbours are used, what leakage explains.

Drawn from a run's log and from the figures that `evaluate perplexity` left beside it; pages are put together in
`run_page.py` and `run_summary.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_retro.reporting.html import paragraph, section, table
from megatron_retro.reporting.plots import Series, bars, line_plot
from megatron_retro.runtime.run_log import RunLog
from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import number_of

_COSTS = "What other neighbours cost more than the real ones"


def health_sections(log: RunLog) -> list[str]:
    """What other neighbours cost, over the run; nothing if it was never measured."""
    measured = _measured(log)
    if not measured:
        return []
    return [
        section(
            "Retrieval health",
            paragraph(
                "What the same model loses on the same held-out tokens when its neighbours are taken away (none), or "
                "exchanged for those of other text (random) or of another chunk of the same sample (shuffled), with "
                "95 % intervals. A model that uses retrieval stays clear above zero."
            ),
            _costs_plot(measured),
            table(("neighbours", "loss", "costs more than real"), _cost_rows(measured[-1]["facts"])),
        )
    ]


def use_sections(log: RunLog) -> list[str]:
    """At which places of a chunk and in which layers neighbours were used when it was last measured."""
    measured = _measured(log)
    if not measured:
        return []
    last = measured[-1]["facts"]
    by_position = [
        Series(variant, list(range(len(values))), values) for variant, values in last["excess_by_position"].items()
    ]
    return [
        section(
            "Where neighbours are used",
            line_plot(
                by_position,
                title=f"{_COSTS}, by place in the attending chunk (last evaluation)",
                x_label="place; 0 is the last token of the chunk that retrieved",
                y_label="nats per token",
            ),
            table(("layer", "share of the residual's norm", "gate rate"), _layer_rows(last)),
        )
    ]


def leakage_section(run: Path) -> list[str]:
    """The curve that `evaluate perplexity --eval-output RUN/evaluation` left."""
    path = run / "evaluation" / "perplexity.json"
    if not path.is_file():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    if "leakage" not in result:
        return []
    curve = result["leakage"]
    if not curve.get("excess"):
        return [section("Leakage", _bits_plot(curve))]
    words = paragraph(
        "Is it copying? Each point holds the held-out chunks whose longest run of tokens in common with a neighbour is "
        "at most so much of the chunk; the last point holds all. A gain on the left is more than copying; one that "
        "comes on the right alone is text that the database holds already."
    )
    return [section("Leakage", words, _leakage_plot(curve))]


def _leakage_plot(curve: dict[str, Any]) -> str:
    series = []
    for name, costs in curve["excess"].items():
        found = [Interval.of(cost) for cost in costs]
        series.append(_band(name, curve["alphas"], found))
    return line_plot(
        series,
        title=f"{_COSTS}, on chunks that share at most this much with their neighbours",
        x_label="longest shared run / chunk length",
        y_label="bits per byte",
    )


def _bits_plot(curve: dict[str, Any]) -> str:
    series = [Series(name, curve["alphas"], [*map(number_of, bits)]) for name, bits in curve["bits_per_byte"].items()]
    title = "Bits per byte of chunks that share at most this much with their neighbours"
    return line_plot(series, title=title, x_label="longest shared run / chunk length", y_label="bits per byte")


def _measured(log: RunLog) -> list[dict[str, Any]]:
    return [record for record in log.evaluations if "excess" in record["facts"]]


def _costs_plot(measured: Sequence[dict[str, Any]]) -> str:
    """Lines over the run; bars where it was measured once."""
    variants = list(measured[-1]["facts"]["excess"])
    costs = {name: [Interval.of(record["facts"]["excess"][name]) for record in measured] for name in variants}
    if len(measured) == 1:
        once = [found[0] for found in costs.values()]
        bounds = [(one.low, one.high) for one in once]
        return bars(variants, [one.mean for one in once], title=_COSTS, y_label="nats per token", bounds=bounds)
    steps = [float(record["step"]) for record in measured]
    series = [_band(name, steps, found) for name, found in costs.items()]
    return line_plot(series, title=_COSTS, x_label="step", y_label="nats per token")


def _band(name: str, places: Sequence[float], found: Sequence[Interval]) -> Series:
    means, lows, highs = ([getattr(one, part) for one in found] for part in ("mean", "low", "high"))
    return Series(name, places, means, lows, highs)


def _cost_rows(last: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (
            variant,
            _loss_text(values),
            str(Interval.of(last["excess"][variant])) if variant in last["excess"] else "",
        )
        for variant, values in last["losses"].items()
    ]


def _loss_text(values: Sequence[float | None]) -> str:
    """Mean with its bounds, without signs."""
    loss = Interval.of(values)
    return f"{loss.mean:.4f} [{loss.low:.4f}, {loss.high:.4f}]"


def _layer_rows(last: dict[str, Any]) -> list[tuple[int, str, str]]:
    return [
        (use["layer"], f"{use['share']:.3g}", "fixed" if use["gate_rate"] is None else f"{use['gate_rate']:.3f}")
        for use in last["layers"]
    ]
