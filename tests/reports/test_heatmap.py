"""Heat maps: what is where, in which colour, and that nothing global is touched."""

import itertools
import os
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from bn_lightning.reports.heatmap import figure_image, heat_map, save_png

GREY, BLACK, RED = (208, 208, 208), (0, 0, 0), (227, 52, 47)


def draw(values, **options):
    values = np.asarray(values, dtype=float)
    rows = [f"layer{index}" for index in range(len(values))]
    return heat_map(values, rows, range(values.shape[1]), title="t", **options)


def colour(figure, row, column):
    """The colour in the middle of a cell, as drawn."""
    pixels = figure_image(figure)
    x, y = figure.axes[0].transData.transform((column, row))
    return tuple(int(part) for part in pixels[len(pixels) - 1 - round(y), round(x)])


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_cells_are_where_their_values_are(log):
    figure = draw([[1.0, 10.0, 100.0], [100.0, 1.0, 10.0]], log=log)
    first = [colour(figure, 0, column) for column in range(3)]
    assert len(set(first)) == 3
    assert [colour(figure, 1, column) for column in range(3)] == [first[2], first[0], first[1]]
    brightness = [sum(part) for part in first]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize(("log", "middle"), [(False, 50.5), (True, 10.0)], ids=["linear", "log"])
def test_the_middle_colour_is_the_middle_of_the_scale(log, middle):
    figure = draw([[1.0, middle, 100.0]], log=log)
    viridis = [tuple(round(255 * part) for part in colormaps["viridis"](position)[:3]) for position in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose([colour(figure, 0, column) for column in range(3)], viridis, atol=2)


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
@pytest.mark.parametrize(
    ("values", "ends"),
    [
        pytest.param([0.0123, 0.5, 7.77], ("0.0123", "7.77"), id="between round numbers"),
        pytest.param([1.0, 2.0, 1e9], ("1", "1e+09"), id="many decades"),
        pytest.param([1.00001, 1.00002], ("1.00001", "1.00002"), id="nearly alike"),
        pytest.param([100.0, 100.3, 112.0], ("100", "112"), id="narrow"),
    ],
)
def test_the_ends_of_the_scale_are_labelled(values, ends, log):
    bar = draw([values], log=log).axes[1]
    figure_image(bar.figure)
    labels = [label for label in bar.get_xticklabels(which="both") if label.get_text()]
    texts = [label.get_text() for label in labels]
    assert (texts[0], texts[-1]) == ends
    assert len(set(texts)) == len(texts)
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_limits_given_are_the_ends():
    labels = draw([[0.2, 0.4]], limits=(0.0, 1.0)).axes[1].get_xticklabels()
    assert (labels[0].get_text(), labels[-1].get_text()) == ("0", "1")


def test_breaks_are_lines_between_columns():
    figure = draw([[1.0, 1.0, 2.0]], breaks=[1])
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[0.5, 0.5]]
    assert colour(figure, 0, 0.5) == (255, 255, 255)


def test_missing_infinite_and_zero_cells_stand_out():
    figure = draw([[np.nan, np.inf, 0.0, -np.inf, 1.0, 50.0]], log=True)
    assert [colour(figure, 0, column) for column in range(4)] == [GREY, RED, BLACK, RED]
    assert "grey: no value, black: 0, red: not finite" in figure.axes[1].get_xlabel()


def test_a_clean_map_explains_no_colours_it_does_not_use():
    assert "grey" not in draw([[1.0, 2.0]], log=True).axes[1].get_xlabel()


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
@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_awkward_values_are_drawn(values, log):
    assert figure_image(draw(values, log=log)).std() > 0


@pytest.mark.parametrize("layers", [5, 60, 300])
def test_every_layer_has_a_readable_label_and_its_own_line(layers):
    figure = draw(np.random.default_rng(0).random((layers, 30)))
    pixels = figure_image(figure)
    assert pixels.dtype == np.uint8
    assert len(pixels) < 3500
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [f"layer{index}" for index in range(layers)]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert min(box.height for box in boxes) >= 6
    assert all(below.y1 <= above.y0 + 1.5 for below, above in itertools.pairwise(boxes))


def test_long_names_are_shortened_in_the_middle():
    names = [f"backbone.encoder.stages.{index}.blocks.attention.self.query_projection" for index in range(2)]
    figure = heat_map([[1.0], [2.0]], names, [0], title="t")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert all(len(label) == 56 and label.startswith("backbone") and label.endswith("projection") for label in labels)


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


def test_png_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "map.png"
    figure = draw([[1.0, 2.0]])
    save_png(figure, path)
    assert imread(path).shape[:2] == figure_image(figure).shape[:2]

    class Broken:
        def savefig(self, file, **options):
            file.write(b"half")
            raise KeyboardInterrupt

    whole = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        save_png(Broken(), path)
    assert path.read_bytes() == whole
    assert [entry.name for entry in path.parent.iterdir()] == ["map.png"]


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
