"""Bars along a network: every value in its place and colour, the largest named, noise that looks like noise."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from bn_lightning.reports.bars import bar_figure
from bn_lightning.reports.heatmap import INFINITE, figure_image
from bn_lightning.reports.labels import Labels

BOUNDS = (("info", 0.1), ("warning", 0.25), ("error", 1.0))


def drawn(values, names=None, bounds=BOUNDS):
    names = names or [f"layer{index}" for index in range(len(values))]
    return bar_figure(names, values, title="t", ylabel="gap", bounds=bounds)


def tops(figure):
    return {round(bar.get_x() + 0.4): bar.get_y() + bar.get_height() for bar in figure.axes[0].patches}


@pytest.mark.parametrize("largest", [0.9, 1234.5], ids=["linear", "logarithmic"])
def test_bars_reach_their_values_in_the_colour_of_their_bound(largest):
    values = [0.05, 0.1, 0.3, None, 1.0, largest]
    figure = drawn(values)
    axes = figure.axes[0]
    assert axes.get_yscale() == ("log" if largest > 2 else "linear")
    assert tops(figure) == {place: pytest.approx(value) for place, value in enumerate(values) if value is not None}
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert len(set(colours[:4])) == 4, "from each bound on another colour"
    assert colours[4] == (colours[3] if largest >= 1 else colours[2])
    low, high = axes.get_ylim()
    assert low < 0.05
    assert high > largest


def test_what_is_not_finite_reaches_the_top_and_comes_first():
    figure = drawn([0.5, math.nan, 2.5, math.inf])
    high = figure.axes[0].get_ylim()[1]
    assert tops(figure) == {0: 0.5, 1: pytest.approx(high), 2: 2.5, 3: pytest.approx(high)}
    assert to_hex(figure.axes[0].patches[1].get_facecolor()) == to_hex(INFINITE)
    told = [text.get_text() for text in figure.texts]
    assert told == ["t", "1  layer1: not finite", "2  layer3: not finite", "3  layer2: 2.5", "4  layer0: 0.5"]


def test_the_five_largest_are_numbered_above_their_bars():
    values = [index / 10 for index in range(10)]
    figure = drawn(values)
    assert [text.get_text() for text in figure.texts[1:]] == [
        f"{number}  layer{place}: {place / 10:.2g}" for number, place in enumerate((9, 8, 7, 6, 5), 1)
    ]
    numbers = {text.get_text(): text.get_position() for text in figure.axes[0].texts if text.get_text().isdecimal()}
    assert {number: place for number, (place, _) in numbers.items()} == {"1": 9, "2": 8, "3": 7, "4": 6, "5": 5}


def test_numbers_of_neighbours_stand_one_above_the_other():
    figure = drawn([0.01] * 290 + [0.9, 0.8, 0.7] + [0.01] * 7)
    heights = {text.get_position()[1] for text in figure.axes[0].texts if text.get_text().isdecimal()}
    assert len(heights) == 3


def test_noise_looks_like_noise():
    figure = drawn([0.001, 0.004, 0.0])
    assert figure.axes[0].get_ylim()[1] >= 0.1
    assert "all below 0.1" in [text.get_text() for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.texts[1:]] == ["1  layer1: 0.004"]
    assert [text.get_text() for text in drawn([0.0, None]).texts] == ["t"]
    assert "all below 0.1" not in [text.get_text() for text in drawn([0.001, 0.1]).axes[0].texts]


def test_bounds_in_sight_are_named_none_upon_another():
    figure = drawn([0.24])
    told = [text.get_text() for text in figure.axes[0].texts if "≥" in text.get_text()]
    assert told == ["info ≥ 0.1", "warning ≥ 0.25"], "and not the error, which is out of sight"
    close = drawn([0.5], bounds=(("a", 0.1), ("b", 0.101), ("c", 0.102)))
    heights = [text.get_position()[1] for text in close.axes[0].texts if "≥" in text.get_text()]
    assert np.diff(heights).min() > 0.04


@pytest.mark.parametrize("number", [1, 60, 400])
def test_many_names_are_thinned_and_none_is_cut_off(number):
    names = [f"stage{index}.{'long_name.' * 8}bn" for index in range(number)]
    figure = drawn([0.1 + index / number for index in range(number)], names)
    labels = next(artist for artist in figure.artists if isinstance(artist, Labels))
    assert len(labels.names) == (number if number <= 60 else 58)
    assert labels.names[-1].startswith(f"stage{labels.places[-1]}")
    assert max(map(len, labels.names)) <= 40
    picture = figure_image(figure)
    assert picture.shape[1] == 1040
    edges = np.concatenate([picture[:, :2, :3].reshape(-1, 3), picture[-2:, :, :3].reshape(-1, 3)])
    assert (edges == 255).all(), "ink at the edge would be cut off"


def test_wrong_input_is_refused():
    for names, values in (([], []), (["a"], [1.0, 2.0])):
        with pytest.raises(ValueError, match="at least one bar and as many values as names"):
            bar_figure(names, values, title="t", ylabel="y", bounds=BOUNDS)


def test_all_texts_are_in_the_picture_and_none_upon_another():
    figure = drawn([0.3, 0.9, 0.8, 0.7, 1.2, 0.4])
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    axes = figure.axes[0]
    above = [text.get_window_extent() for text in figure.texts]
    numbers = [text.get_window_extent() for text in axes.texts if text.get_text().isdecimal()]
    for box in (*above, *numbers):
        assert 0 <= box.x0 < box.x1 <= width
        assert axes.bbox.y1 <= box.y0 < box.y1 <= height
    assert all(one.y0 >= other.y1 for one, other in itertools.pairwise(above)), "lines from the top down"
    assert max(box.y1 for box in numbers) <= above[-1].y0
    assert axes.get_ylabel() == "gap"
    assert not axes.get_xticks().size
    named = [text.get_window_extent() for text in axes.texts if "≥" in text.get_text()]
    assert all(axes.bbox.x1 < box.x0 < box.x1 <= width for box in named)
    for bound, box in zip((0.1, 0.25, 1.0), named, strict=True):
        assert (box.y0 + box.y1) / 2 == pytest.approx(axes.transData.transform((0, bound))[1], abs=3)


@pytest.mark.parametrize(("largest", "scale"), [(1.99, "linear"), (2.01, "log")])
def test_the_scale_is_logarithmic_from_twenty_times_the_lowest_bound(largest, scale):
    axes = drawn([0.05, largest]).axes[0]
    assert axes.get_yscale() == scale
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert f"{largest:g}" in labels
    assert len(axes.yaxis.get_minor_locator()()) == 0
