"""Bars with bounds: what is drawn stands where the scale says."""

from __future__ import annotations

import math
import re

import pytest

from megatron_retro.reporting.plots import Series, bars, line_plot


def test_bounds_stand_on_the_scale_of_their_bars() -> None:
    plot = bars(["a", "b"], [2.0, -1.0], title="t", y_label="y", bounds=[(1.0, 4.0), None])
    rectangles = [
        (float(y), float(height))
        for y, height in re.findall(r'<rect x="[\d.]+" y="([\d.]+)".*?height="([\d.]+)"', plot)
    ]
    (top_a, height_a), (zero, height_b) = rectangles
    unit = height_b  # the second bar is one unit long and hangs from zero
    assert top_a + height_a == pytest.approx(zero, abs=0.2) and height_a == pytest.approx(2 * unit, abs=0.2)
    (high, low) = re.findall(r'd="M[\d.]+ ([\d.]+)h10m-5 0V([\d.]+)', plot)[0]
    assert float(high) == pytest.approx(zero - 4 * unit, abs=0.2)
    assert float(low) == pytest.approx(zero - 1 * unit, abs=0.2)
    assert plot.count("h10m-5") == 1
    assert "h10m-5" not in bars(["a"], [1.0], title="t", y_label="y")


def test_a_height_that_is_no_number_is_left_out() -> None:
    plot = bars(["a", "diverged"], [2.0, math.nan], title="t", y_label="y", bounds=[(1.0, 3.0), (math.nan, math.inf)])
    picture = plot.partition("</svg>")[0]
    assert picture.count("<rect") == 1 and picture.count("h10m-5") == 1 and "diverged" in picture
    assert '"nan' not in picture and " nan" not in picture


def test_a_band_without_bounds_is_left_out() -> None:
    """One document alone has a mean and no interval."""
    for high, bands in ((math.nan, 0), (2.5, 1)):
        line = Series("a", [1, 2], [1.0, 2.0], [0.5, 1.5], [1.5, high])
        drawn = line_plot([line], title="t", x_label="x", y_label="y").partition("<details")[0]
        assert drawn.count("opacity") == bands and "nan" not in drawn


def test_under_two_decades_a_log_axis_has_ticks_of_one_two_and_five() -> None:
    line = Series("a", [0.125, 0.25, 0.5, 1.0], [1.0, 2.0, 3.0, 4.0])
    drawn = line_plot([line], title="t", x_label="x", y_label="y", log_x=True).partition("<details")[0]
    assert re.findall(r'text-anchor="middle">([\d.]+)<', drawn) == ["0.2", "0.5", "1"]


def test_what_a_bar_is_a_mean_of_stands_on_its_scale() -> None:
    drawn = bars(["a", "b"], [1.0, 2.0], title="t", y_label="y", bounds=[(0.5, 1.5), (1.0, 3.0)], dots=[(0.0, 4.0), ()])
    heights = [float(at) for at in re.findall(r'<circle class="dot" cx="[\d.]+" cy="([\d.]+)"', drawn)]
    scale = [float(at) for at in re.findall(r'<path class="grid" d="M[\d.]+ ([\d.]+)H', drawn)]
    assert heights == [scale[0], scale[-1]], "0 and 4 are ticks: the axis makes room for dots"
