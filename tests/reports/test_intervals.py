"""Means with intervals: digits that mean something, and every reading drawn where it is."""

import math

import numpy as np
import pytest

from bn_lightning.reports.heatmap import figure_image
from bn_lightning.reports.intervals import interval_figure, interval_in_words


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.3123, 0.2213, 0.4021), "0.31 [0.22, 0.40]"),
        ((2.4561, 2.4550, 2.4572), "2.4561 [2.4550, 2.4572]"),
        ((12.0, -100.0, 140.0), "12 [-100, 140]"),
        ((0.0, -0.4, 0.004), "0.00 [-0.40, 0.00]"),
        ((-0.001, -0.4, 0.2), "0.00 [-0.40, 0.20]"),
        ((0.25, 0.25, 0.25), "0.25 [0.25, 0.25]"),
        ((6.5e-9, -2.9e-8, 2.6e-8), "6.5e-09 [-2.9e-08, 2.6e-08]"),
        ((1.5e7, 1e7, 2e7), "1.5e+07 [1e+07, 2e+07]"),
        ((0.25, -math.inf, math.inf), "0.25 (no interval)"),
        ((math.nan, math.nan, math.nan), "not finite"),
        ((math.inf, math.nan, math.nan), "not finite"),
    ],
    ids=str,
)
def test_an_interval_in_words(interval, words):
    assert interval_in_words(*interval) == words


def lines(figure):
    """Return each row's dots and lines by its place."""
    dots, spans = {}, {}
    for line in figure.axes[0].get_lines():
        x, y = line.get_xdata(), line.get_ydata()
        (dots if len(x) == 1 else spans)[y[0]] = tuple(x)
    return dots, spans


def test_every_reading_is_drawn_where_it_is_the_first_on_top():
    rows = [("a", 1.0, 0.5, 1.5), ("b", 2.0, -math.inf, math.inf), ("c", math.nan, math.nan, math.nan)]
    figure = interval_figure(rows, title="t")
    dots, spans = lines(figure)
    assert dots == {0: (1.0,), 1: (2.0,)}
    assert spans == {0: (0.5, 1.5)}
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    low, high = axes.get_ylim()
    assert low > high
    assert [text.get_text() for text in axes.texts] == ["1.0 [0.5, 1.5]", "2 (no interval)", "not finite"]
    assert np.asarray(figure_image(figure)).std() > 0


def test_the_scale_is_logarithmic_only_where_all_is_above_zero_and_differs_much():
    def scale(*rows):
        return interval_figure([("x", *row) for row in rows], title="t").axes[0].get_xscale()

    assert scale((1, 0.9, 1.1), (100, 90, 110)) == "log"
    assert scale((1, 0.9, 1.1), (2, 1.9, 2.1)) == "linear"
    assert scale((1, -0.9, 1.1), (100, 90, 110)) == "linear"
    assert scale((math.nan,) * 3) == "linear"


def test_no_row_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        interval_figure([], title="t")
