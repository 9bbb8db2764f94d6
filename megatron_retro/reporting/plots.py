"""Plots as inline SVG: lines, bars, histograms. No script; every plot carries its numbers as a table below it.

Series differ by color and by dashes or position, so that no meaning hangs on color alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from megatron_retro.reporting.html import table
from megatron_retro.runtime.statistics import Interval

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 28, 46
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "12 4")
_TABLE_ROWS = 60


@dataclass(frozen=True)
class Series:
    """One line of a plot; `low` and `high` draw a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    @classmethod
    def with_bounds(cls, name: str, x: Sequence[float], found: Sequence[Interval]) -> Series:
        """Means with a band from the lower to the upper bounds."""
        return cls(name, x, [one.mean for one in found], [one.low for one in found], [one.high for one in found])


@dataclass(frozen=True)
class Axis:
    """Value -> pixel of one direction, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (
            (math.log10(number) for number in (self.low, self.high, value))
            if self.log
            else (
                self.low,
                self.high,
                value,
            )
        )
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            exponents = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            if len(exponents) < 3:  # under two decades
                first = math.floor(math.log10(self.low))
                round_ones = [factor * 10.0**exponent for exponent in range(first, first + 4) for factor in (1, 2, 5)]
                inside = [value for value in round_ones if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
                return inside or [self.low, self.high]
            step = max(1, len(exponents) // 6)
            return [10.0**exponent for exponent in exponents[::step]]
        span = (self.high - self.low) or 1.0
        rough = span / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    floor: float | None = None,
) -> str:
    """Lines over a common axis. `floor` draws a dashed line across, a target say."""
    usable = [_finite_part(one, log_x, log_y) for one in series]
    xs = [x for one in usable for x in one.x]
    ys = [y for one in usable for part in (one.y, one.low or (), one.high or ()) for y in part]
    ys += [floor] if floor is not None else []
    if not xs:
        return _figure(title, x_label, y_label, [], _points_table(series, x_label))
    across = Axis(*_range(xs, log_x), _LEFT, _WIDTH - _RIGHT, log_x)
    up = Axis(*_range(ys, log_y), _HEIGHT - _BOTTOM, _TOP, log_y)
    marks = _frame(across, up, _number, _number)
    if floor is not None:
        at = up.at(floor)
        marks.append(f'<path class="axis" d="M{across.start} {at:.1f}H{across.end}" stroke-dasharray="3 3"/>')
    for number, one in enumerate(usable):
        marks += _line(one, across, up, number)
    marks += _legend([one.name for one in usable]) if len(usable) > 1 else []
    return _figure(title, x_label, y_label, marks, _points_table(series, x_label))


def histogram(
    counts: Sequence[float], edges: Sequence[float], *, title: str, x_label: str, y_label: str = "count"
) -> str:
    """Bars between `edges` (one more than counts)."""
    if not len(counts):
        return _figure(title, x_label, y_label, [], "")
    across = Axis(float(edges[0]), float(edges[-1]), _LEFT, _WIDTH - _RIGHT)
    up = Axis(0.0, max(max(counts), 1e-12), _HEIGHT - _BOTTOM, _TOP)
    marks = _frame(across, up, _number, _number)
    for (low, high), value in zip(pairwise(edges), counts, strict=True):
        left, right, top = across.at(low), across.at(high), up.at(value)
        marks.append(_bar(left, right - left, top, up.start - top, f"{low:.4g} to {high:.4g}: {value:.4g}"))
    rows = [(f"{low:.4g}", f"{high:.4g}", value) for (low, high), value in zip(pairwise(edges), counts, strict=True)]
    return _figure(title, x_label, y_label, marks, table(("from", "to", y_label), rows))


def bars(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    y_label: str,
    bounds: Sequence[tuple[float, float] | None] | None = None,
    dots: Sequence[Sequence[float]] | None = None,
) -> str:
    """One bar per label, with a line from the lower to the upper bound where there are any, and what it is a mean of
    as dots beside the line."""
    if not labels:
        return _figure(title, "", y_label, [], "")
    between = list(bounds or [None] * len(labels))
    ends = [end for one in between if one is not None for end in one]
    ends += [dot for some in dots or () for dot in some]
    across = Axis(0.0, float(len(labels)), _LEFT, _WIDTH - _RIGHT)
    heights = [height for height in (*values, *ends) if math.isfinite(height)]
    up = Axis(min([0.0, *heights]), max([0.0, *heights, 1e-12]), _HEIGHT - _BOTTOM, _TOP)
    marks = _frame(across, up, lambda _: "", _number)
    for number, (label, value, bound) in enumerate(zip(labels, values, between, strict=True)):
        left, width = across.at(number + 0.15), across.at(0.7) - across.at(0.0)
        marks.append(_text(left + width / 2, up.start + 16, label, "middle"))
        if math.isfinite(value):
            top, bottom = sorted((up.at(value), up.at(0.0)))
            marks.append(_bar(left, width, top, bottom - top, f"{label}: {value:.4g}", faint=bound is not None))
        if bound is not None and all(map(math.isfinite, bound)):
            marks.append(_whisker(left + width / 2, up.at(bound[1]), up.at(bound[0])))
        for dot in filter(math.isfinite, dots[number] if dots else ()):
            marks.append(f'<circle class="dot" cx="{left + 0.72 * width:.1f}" cy="{up.at(dot):.1f}" r="3.5"/>')
    return _figure(title, "", y_label, marks, table(("", y_label), list(zip(labels, values, strict=True))))


def _finite_part(series: Series, log_x: bool, log_y: bool) -> Series:
    keep = [
        number
        for number, (x, y) in enumerate(zip(series.x, series.y, strict=True))
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]

    def part(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [float(values[number]) for number in keep]

    return Series(series.name, part(series.x) or [], part(series.y) or [], part(series.low), part(series.high))


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = min(finite), max(finite)
    if low == high:
        half = abs(low) / 2 or 0.5
        return (low / 2, high * 2) if log else (low - half, high + half)
    margin = 0.0 if log else (high - low) * 0.04
    return low - margin, high + margin


def _frame(across: Axis, up: Axis, x_text: Callable[[float], str], y_text: Callable[[float], str]) -> list[str]:
    marks = []
    for value in up.ticks():
        at = up.at(value)
        marks.append(f'<path class="grid" d="M{across.start} {at:.1f}H{across.end}"/>')
        marks.append(_text(across.start - 8, at + 4, y_text(value), "end"))
    marks += [_text(across.at(value), up.start + 16, x_text(value), "middle") for value in across.ticks()]
    marks.append(f'<path class="axis" d="M{across.start} {up.end}V{up.start}H{across.end}" fill="none"/>')
    return marks


def _line(series: Series, across: Axis, up: Axis, number: int) -> list[str]:
    color, marks = f"var(--s{number % 6})", []
    if series.low is not None and series.high is not None and all(map(math.isfinite, (*series.low, *series.high))):
        there = [f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in zip(series.x, series.high, strict=True)]
        back = [f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in zip(series.x, series.low, strict=True)]
        marks.append(f'<path d="M{"L".join(there + back[::-1])}Z" fill="{color}" opacity=".18"/>')
    points = [f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in zip(series.x, series.y, strict=True)]
    dashes = _DASHES[number % len(_DASHES)]
    marks.append(
        f'<path d="M{"L".join(points)}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>'
    )
    if len(points) <= 40:
        marks += [f'<circle cx="{at.split()[0]}" cy="{at.split()[1]}" r="3" fill="{color}"/>' for at in points]
    return marks


def _legend(names: Sequence[str]) -> list[str]:
    marks, left = [], float(_LEFT + 8)
    for number, name in enumerate(names):
        color, dashes = f"var(--s{number % 6})", _DASHES[number % len(_DASHES)]
        marks.append(f'<path d="M{left:.0f} 14h22" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dashes}"/>')
        marks.append(_text(left + 28, 18, name, "start"))
        left += 48 + 7.0 * len(name)
    return marks


def _bar(left: float, width: float, top: float, height: float, words: str, *, faint: bool = False) -> str:
    """Faint under a line from bound to bound, which could not be seen on the full color."""
    size = f'x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}" height="{max(height, 0):.1f}"'
    opacity = ' fill-opacity=".5"' if faint else ""
    return f'<rect {size} fill="var(--s0)"{opacity}><title>{escape(words)}</title></rect>'


def _whisker(x: float, top: float, bottom: float) -> str:
    return f'<path class="bound" d="M{x - 5:.1f} {top:.1f}h10m-5 0V{bottom:.1f}m-5 0h10" fill="none"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _figure(title: str, x_label: str, y_label: str, marks: Sequence[str], numbers: str) -> str:
    inside = list(marks) or [_text(_WIDTH / 2, _HEIGHT / 2, "no data", "middle")]
    inside.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "middle"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    rotated = f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    label = escape(f"{title}: {y_label} by {x_label}" if x_label else f"{title}: {y_label}")
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(inside)}{rotated}</svg>'
    details = f"<details><summary>numbers</summary>{numbers}</details>" if numbers else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}{details}</figure>"


def _points_table(series: Sequence[Series], x_label: str) -> str:
    rows: list[tuple[str, float, float]] = []
    for one in series:
        step = max(1, math.ceil(len(one.x) / _TABLE_ROWS))
        rows += [(one.name, float(x), float(y)) for x, y in list(zip(one.x, one.y, strict=True))[::step]]
    return table(("line", x_label, "value"), rows)


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.6g}"
