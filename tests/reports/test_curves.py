"""Curves, their spread and their axes."""

import math

import pytest

from bn_lightning.reports.curves import Curve, curve_figure
from bn_lightning.reports.heatmap import figure_image


def test_each_curve_is_a_line_with_its_label_and_its_spread():
    curves = [
        Curve("with", [1, 2, 3], [1.0, math.inf, 3.0], low=[0.5, 1.0, 2.0], high=[1.5, 2.0, 4.0]),
        Curve("without", [1, 2, 3], [3.0, 2.0, math.nan]),
    ]
    figure = curve_figure(curves, title="a_b $c", xlabel="step", ylabel="loss", yscale="log")
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["with", "without"]
    assert [math.isnan(value) for value in axes.lines[0].get_ydata()] == [False, True, False]
    assert len(axes.collections) == 1
    assert axes.get_yscale() == "log"
    assert figure_image(figure).std() > 0  # it draws


def test_a_logarithm_of_nothing_is_left_out():
    figure = curve_figure(
        [Curve("", [1, 2], [0.0, 0.0])], title="t", xlabel="x", ylabel="y", xscale="log", yscale="log"
    )
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("log", "linear")
    assert figure.axes[0].get_legend() is None


def test_refuses_to_draw_nothing():
    with pytest.raises(ValueError, match="at least one curve"):
        curve_figure([], title="t", xlabel="x", ylabel="y")
