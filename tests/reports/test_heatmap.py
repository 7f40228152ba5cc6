"""Heat maps: what is where, in which colour, and that nothing global is touched."""

import io
import itertools
import os
import re
import sys

import numpy as np
import pytest
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from bn_lightning.reports.heatmap import figure_image, figure_png, heat_map, save_png
from bn_lightning.reports.labels import Labels

GREY, BLACK, PINK = (176, 176, 176), (0, 0, 0), (255, 0, 212)


def draw(values, **options):
    values = np.asarray(values, dtype=float)
    rows = [f"layer{index}" for index in range(len(values))]
    return heat_map(values, rows, range(values.shape[1]), title="t", **options)


def legend(figure):
    """What the colours beside the bar's own are said to mean."""
    return [text.get_text() for text in figure.axes[1].texts if text.get_text() != "■"]


def colour(figure, row, column):
    """The colour in the middle of a cell, as drawn."""
    pixels = figure_image(figure)
    x, y = figure.axes[0].transData.transform((column, row))
    return tuple(int(part) for part in pixels[len(pixels) - 1 - round(y), round(x)])


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_cells_are_where_their_values_are(scale):
    figure = draw([[1.0, 10.0, 100.0], [100.0, 1.0, 10.0]], scale=scale)
    first = [colour(figure, 0, column) for column in range(3)]
    assert len(set(first)) == 3
    assert [colour(figure, 1, column) for column in range(3)] == [first[2], first[0], first[1]]
    brightness = [sum(part) for part in first]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize(("scale", "middle"), [("linear", 50.5), ("log", 10.0)])
def test_the_middle_colour_is_the_middle_of_the_scale(scale, middle):
    figure = draw([[1.0, middle, 100.0]], scale=scale)
    viridis = [tuple(round(255 * part) for part in colormaps["viridis"](position)[:3]) for position in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose([colour(figure, 0, column) for column in range(3)], viridis, atol=2)


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize(
    ("values", "ends"),
    [
        pytest.param([0.0123, 0.5, 7.77], ("0.0123", "7.77"), id="between round numbers"),
        pytest.param([1.0, 2.0, 1e9], ("1", "1e+09"), id="many decades"),
        pytest.param([1.00001, 1.00002], ("1.00001", "1.00002"), id="nearly alike"),
        pytest.param([0.0099, 1.01], ("0.0099", "1.01"), id="just beyond round numbers"),
        pytest.param([100.0, 100.3, 112.0], ("100", "112"), id="narrow"),
    ],
)
def test_the_ends_of_the_scale_are_labelled(values, ends, scale):
    bar = draw([values], scale=scale).axes[1]
    figure_image(bar.figure)
    labels = [label for label in bar.get_xticklabels(which="both") if label.get_text()]
    texts = [label.get_text() for label in labels]
    assert (texts[0], texts[-1]) == ends
    assert len(set(texts)) == len(texts)
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def diverging_colours(*values):
    figure = draw([values], scale="diverging")
    return [np.array(colour(figure, 0, column)) for column in range(len(values))]


def test_diverging_colours_are_white_at_0_and_blue_below():
    below, zero, above, far_above = diverging_colours(-1.0, 0.0, 1.0, 4.0)
    assert zero.min() > 240
    assert below[2] > below[0] + 20  # blue
    assert above[0] > above[2] + 20  # red
    assert far_above.sum() < above.sum()
    assert abs(int(below.sum()) - int(above.sum())) < 60  # as far from white


def test_diverging_colours_tell_small_values_apart_beside_large_ones():
    small, tenfold, zero, *_ = diverging_colours(0.01, 0.1, 0.0, 0.1, -1.0, 10.0, 100.0)
    assert np.abs(small - zero).max() > 8
    assert np.abs(tenfold - small).max() > 8


def test_a_diverging_scale_has_at_most_six_decades():
    norm = draw([[1e-12, 1e-11, -100.0]], scale="diverging").axes[0].images[0].norm
    assert (norm.vmin, norm.vmax) == (-100.0, 100.0)
    assert norm.linthresh == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        pytest.param([-3.0, 1.0], ["-3", "-2", "-1", "0", "1", "2", "3"], id="linear"),
        pytest.param([-5.0, 1e-3, 1e-2], ["-5", "-1", "0", "1", "5"], id="several decades"),
        pytest.param([0.0], ["-1", "0", "1"], id="zero"),
    ],
)
def test_a_diverging_scale_is_symmetric_and_labels_0(values, labels):
    bar = draw([values], scale="diverging").axes[1]
    texts = [label.get_text() for label in bar.get_xticklabels()]
    assert set(labels) <= set(texts)
    middle = texts.index("0")
    assert texts[:middle] == [f"-{text}" for text in texts[:middle:-1]]
    assert bar.get_xticks()[middle] == pytest.approx(0.5)
    figure_image(bar.figure)
    boxes = [label.get_window_extent() for label in bar.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_limits_given_are_the_ends():
    labels = draw([[0.2, 0.4]], limits=(0.0, 1.0)).axes[1].get_xticklabels()
    assert (labels[0].get_text(), labels[-1].get_text()) == ("0", "1")


def test_breaks_are_lines_between_columns():
    figure = draw([[1.0, 1.0, 2.0]], breaks=[1])
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[0.5, 0.5]]
    assert colour(figure, 0, 0.5) == (255, 255, 255)


def test_missing_infinite_and_zero_cells_stand_out():
    figure = draw([[np.nan, np.inf, 0.0, -np.inf, 1.0, 50.0]], scale="log")
    assert [colour(figure, 0, column) for column in range(4)] == [GREY, PINK, BLACK, PINK]
    assert legend(figure) == ["no value", "0", "not finite"]
    swatches = [to_rgb(text.get_color()) for text in figure.axes[1].texts if text.get_text() == "■"]
    assert [tuple(round(255 * part) for part in swatch) for swatch in swatches] == [GREY, BLACK, PINK]


def test_a_clean_map_explains_no_colours_it_does_not_use():
    assert legend(draw([[1.0, 2.0]], scale="log")) == []


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([[3.0, 3.0]], id="constant"),
        pytest.param([[0.0, 0.0]], id="zeros"),
        pytest.param([[np.nan, np.nan]], id="all missing"),
        pytest.param([[np.inf, -np.inf]], id="all infinite"),
        pytest.param([[1e-300, 1e300]], id="600 decades"),
        pytest.param([[-1.0, -2.0]], id="negative"),
        pytest.param([[1.0]], id="one cell"),
    ],
)
@pytest.mark.parametrize("scale", ["linear", "log", "diverging"])
def test_awkward_values_are_drawn(values, scale):
    assert figure_image(draw(values, scale=scale)).std() > 0


def runs(inked):
    """How many rows of pixels each unbroken run of True has."""
    return [len(list(run)) for is_ink, run in itertools.groupby(inked) if is_ink]


@pytest.mark.parametrize("layers", [5, 60, 300])
def test_every_layer_has_a_readable_label_and_its_own_line(layers):
    figure = draw(np.random.default_rng(0).random((layers, 30)))
    pixels = figure_image(figure)
    assert pixels.dtype == np.uint8
    assert len(pixels) < 3500
    box = figure.axes[0].bbox
    names = (
        pixels[len(pixels) - round(box.y1) : len(pixels) - round(box.y0), : round(box.x0) - 2].min(axis=(1, 2)) < 128
    )
    heights = runs(names)
    assert len(heights) == layers  # no line touches the next
    assert min(heights) >= 6
    tops = np.flatnonzero(np.diff(names.astype(int), prepend=0) == 1)
    rows = np.arange(layers) * (box.height / layers)
    np.testing.assert_allclose(tops - rows, np.mean(tops - rows), atol=1.5)  # each beside its row


def test_each_name_stands_beside_its_own_row():
    figure = heat_map([[1.0], [2.0], [3.0]], ["i", "MMMMMMMM", "MMM"], [0], title="t")
    box, pixels = figure.axes[0].bbox, figure_image(figure)
    ink = 255 - pixels[-round(box.y1) : -round(box.y0), : round(box.x0) - 2].min(axis=2)
    first, second, third = (int(row.sum()) for row in np.array_split(ink, 3))
    assert first < third < second


@pytest.mark.parametrize("name", ["layer1.0.conv1", "W.M.wide_names_of_many_letters"], ids=len)
def test_names_begin_within_the_picture_and_end_before_the_map(name):
    figure = heat_map([[1.0], [2.0]], ["a", name], [0], title="t")
    box, pixels = figure.axes[0].bbox, figure_image(figure)
    inked = np.flatnonzero((pixels[-round(box.y1) : -round(box.y0)].min(axis=(0, 2)) < 128)[: round(box.x0) - 2])
    assert inked[0] >= 3
    assert box.x0 - inked[-1] > 4


def test_a_figure_saved_as_text_has_the_names_as_text():
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        heat_map([[1.0], [2.0]], ["stem.conv", "$x$"], [0], title="t").savefig(file, format="svg")
    assert re.findall(">(stem.conv|\\$x\\$)<", file.getvalue()) == ["stem.conv", "$x$"]


def test_a_figure_cropped_as_notebooks_do_keeps_the_names():
    figure, file = draw([[1.0, 2.0]]), io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0)
    file.seek(0)
    assert imread(file).shape[1] >= figure.axes[0].bbox.x1 - 12


def test_long_names_are_shortened_in_the_middle():
    names = [f"backbone.encoder.stages.{index}.blocks.attention.self.query_projection" for index in range(2)]
    figure = heat_map([[1.0], [2.0]], names, [0], title="t")
    (labels,) = figure.findobj(Labels)
    assert all(len(name) == 56 and name.startswith("backbone") and name.endswith("projection") for name in labels.names)


def test_few_columns_are_labelled_and_the_ends_are_among_them():
    figure = heat_map(np.ones((2, 400)), ["a", "b"], range(0, 4000, 10), title="t")
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert (ticks[0], ticks[-1], len(ticks)) == ("0", "3990", 6)


@pytest.mark.parametrize(
    ("values", "rows", "columns"),
    [
        pytest.param([[1.0]], ["a", "b"], [0], id="too many names"),
        pytest.param([[1.0]], ["a"], [], id="too few columns"),
        pytest.param(np.ones((0, 0)), [], [], id="nothing"),
    ],
)
def test_names_that_do_not_fit_are_refused(values, rows, columns):
    with pytest.raises(ValueError, match="shape"):
        heat_map(values, rows, columns, title="t")


def test_a_png_has_the_colours_of_the_figure(tmp_path):
    figure = draw(np.random.default_rng(0).standard_normal((60, 400)), scale="diverging")
    save_png(figure, tmp_path / "new" / "map.png")
    found = np.round(255 * imread(tmp_path / "new" / "map.png")[..., :3]).astype(int)
    assert np.abs(found - figure_image(figure)).max() <= 6


@pytest.mark.parametrize(("layers", "most"), [(60, 60), (300, 300)])
def test_a_png_is_small(layers, most):
    assert len(figure_png(draw(np.random.default_rng(0).random((layers, 400))))) < most * 1024


@pytest.mark.skipif(os.name != "posix", reason="permissions are another matter there")
@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_png_has_the_usual_permissions(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_png(draw([[1.0, 2.0]]), tmp_path / "map.png")
    finally:
        os.umask(before)
    assert (tmp_path / "map.png").stat().st_mode & 0o777 == 0o666 & ~umask


def test_pyplot_stays_out_of_it():
    draw([[1.0, 2.0]])
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_what_is_too_small_for_a_logarithmic_scale_is_not_shown_as_zero():
    pixels = figure_image(heat_map([[1e-20, 0.0, 1.0]], ["a"], [0, 1, 2], title="t", scale="log"))
    row = pixels[pixels.shape[0] - 60]
    colours = [tuple(row[position]) for position in range(0, len(row), 7)]
    assert (68, 1, 84) in colours, "the lowest colour"
    assert (0, 0, 0) in colours, "zero"
