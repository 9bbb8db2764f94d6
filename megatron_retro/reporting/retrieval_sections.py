"""What retrieval did during a run, as parts of a page: what other neighbours cost, and where neighbours are used."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.reporting.html import paragraph, section, table
from megatron_retro.reporting.plots import Series, bars, line_plot
from megatron_retro.runtime.run_log import RunLog
from megatron_retro.runtime.run_records import RetrievalHealth

_COSTS = "What other neighbours cost more than the real ones"


def health_sections(log: RunLog) -> list[str]:
    """What other neighbours cost, over the run; nothing if it was never measured."""
    measured = log.health
    if not measured:
        return []
    _, last = measured[-1]
    return [
        section(
            "Retrieval health",
            paragraph(
                "What the same model loses on the same held-out tokens when its neighbours are taken away (none), or "
                "exchanged for those of other text (random) or of another chunk of the same sample (shuffled), with "
                "95 % intervals. A model that uses retrieval stays clear above zero."
            ),
            _costs_plot(measured),
            table(("neighbours", "loss", "costs more than real"), _cost_rows(last)),
        )
    ]


def use_sections(log: RunLog) -> list[str]:
    """At which places of a chunk and in which layers neighbours were used when it was last measured."""
    if not log.health:
        return []
    _, last = log.health[-1]
    by_position = [
        Series(variant, list(range(len(values))), values) for variant, values in last.excess_by_position.items()
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


def _costs_plot(measured: Sequence[tuple[int, RetrievalHealth]]) -> str:
    """Lines over the run; bars where it was measured once."""
    variants = list(measured[-1][1].excess)
    costs = {name: [health.excess[name] for _, health in measured] for name in variants}
    if len(measured) == 1:
        once = [found[0] for found in costs.values()]
        bounds = [(one.low, one.high) for one in once]
        return bars(variants, [one.mean for one in once], title=_COSTS, y_label="nats per token", bounds=bounds)
    steps = [float(step) for step, _ in measured]
    series = [Series.with_bounds(name, steps, found) for name, found in costs.items()]
    return line_plot(series, title=_COSTS, x_label="step", y_label="nats per token")


def _cost_rows(health: RetrievalHealth) -> list[tuple[str, str, str]]:
    return [
        (
            variant,
            f"{loss.mean:.4f} [{loss.low:.4f}, {loss.high:.4f}]",
            str(health.excess[variant]) if variant in health.excess else "",
        )
        for variant, loss in health.losses.items()
    ]


def _layer_rows(health: RetrievalHealth) -> list[tuple[int, str, str]]:
    return [
        (use.layer, f"{use.share:.3g}", "fixed" if use.gate_rate is None else f"{use.gate_rate:.3f}")
        for use in health.layers
    ]
