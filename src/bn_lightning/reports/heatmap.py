"""Heat maps as figures, pictures in memory and PNG files, without pyplot and its global state."""

import os
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from bn_lightning.reports.atomic import atomic_write
from bn_lightning.reports.scales import Scale, colour_norm, scale_ticks
from bn_lightning.reports.shortened import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy import ndarray

__all__ = ["INFINITE", "figure_image", "figure_png", "heat_map", "save_png"]

_DPI = 100
_MOST_TICKS = 6
# Pixels. A cell's width is a whole number of them: such a picture is sharp, and half the size as a file.
_MAP_WIDTH = 800
_MARGIN, _TITLE, _BAR, _TEXT_LINE = 12, 36, 14, 18
# In a map higher than this, steps stand above it too.
_TALL = 900
_COLOURS = {"linear": "viridis", "log": "viridis", "diverging": "RdBu_r"}
# What cannot be taken for a value: neither viridis, dark violet to yellow, nor blue over white to red has these.
_MISSING, _ZERO, INFINITE = "#b0b0b0", "black", "#ff00d4"


def heat_map(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[object],
    *,
    title: str,
    xlabel: str = "step",
    scale: Scale = "linear",
    limits: tuple[float, float] | None = None,
    breaks: Sequence[int] = (),
) -> "Figure":
    """Draw values as colours, the first row on top.

    Grey is a missing value (NaN), pink an infinite one, and on a logarithmic scale black is 0 or less. What of these
    occurs is said beside the colour bar.

    Args:
        values: Shape (rows, columns); anything NumPy takes.
        rows: Row names; long ones are shortened in the middle.
        columns: What to write below the columns, of which a few are chosen.
        title: One line: what the colours mean, with the unit.
        xlabel: What the columns are.
        scale: ``"linear"``; ``"log"``, over at most 12 decades; or ``"diverging"``, blue below 0 and red above, as
            far to either side, and logarithmic away from 0 where magnitudes differ much.
        limits: The ends of a linear or logarithmic scale; by default those of the finite values.
        breaks: Columns with a thin line on their left, where the distance between columns changes.

    Raises:
        ValueError: If the names do not fit the values, or there is nothing to draw.

    Example:
        >>> figure = heat_map([[1.0, 2.0]], ["conv1"], [0, 50], title="standard deviation")
        >>> figure_image(figure).shape[2]
        3
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bn_lightning.reports.labels import Labels, labels_width

    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(rows), len(columns)) or not array.size:
        raise ValueError(
            f"a heat map needs values of shape (rows, columns), at least one of each: got values of shape "
            f"{array.shape} for {len(rows)} rows and {len(columns)} columns."
        )
    names = [shortened(name) for name in rows]
    row_height, font = _row_height(len(rows))
    width, height = len(columns) * max(1, round(_MAP_WIDTH / len(columns))), len(rows) * row_height
    tall = height > _TALL
    # Margins are computed, not found by matplotlib's layout engine, which draws everything twice.
    left = labels_width(names, font, _DPI) + 2 * _MARGIN
    top = _TITLE + 2 * _TEXT_LINE + _BAR + tall * _TEXT_LINE
    whole = left + width + 3 * _MARGIN, top + height + 2 * _TEXT_LINE + _MARGIN
    figure = Figure(figsize=(whole[0] / _DPI, whole[1] / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    start = _MARGIN / whole[0], 1 - _MARGIN / whole[1]
    figure.suptitle(title, x=start[0], y=start[1], ha="left", va="top", fontsize=12, parse_math=False)

    axes = figure.add_axes(_place(whole, left, top, width, height))
    norm = colour_norm(array, scale, limits)
    _paint(axes, array, norm, scale)
    axes.set_yticks([])
    Labels(axes, names, range(len(names)), size=font)
    ticks = np.unique(np.linspace(0, len(columns) - 1, min(_MOST_TICKS, len(columns))).round().astype(int))
    axes.set_xticks(ticks, [str(columns[tick]) for tick in ticks])
    axes.tick_params(axis="x", labelsize=9, top=tall, labeltop=tall)
    axes.set_xlabel(xlabel, fontsize=10)
    for column in breaks:
        axes.axvline(column - 0.5, color="black" if scale == "diverging" else "white", linewidth=1)

    # Above the map: in a tall picture, what the colours mean has to stand where reading begins.
    bar = figure.add_axes(_place(whole, left, _TITLE + _TEXT_LINE, round(0.62 * width), _BAR))
    _colour_bar(bar, norm, scale, letter=7 / (0.62 * width))
    _legend(bar, array, scale)
    return figure


def figure_image(figure: "Figure") -> "ndarray[Any, Any]":
    """Render a figure.

    Returns:
        Red, green and blue, uint8, shape (height, width, 3).
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def figure_png(figure: "Figure") -> bytes:
    """Render a figure as a PNG of 256 colours, a fifth the size of one of red, green and blue.

    Colours are off by at most a few of 255 steps.
    """
    from PIL import Image

    picture = Image.fromarray(figure_image(figure))
    file = BytesIO()
    picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, "png")
    return file.getvalue()


def save_png(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG; a reader sees the old file or the whole new one."""
    png = figure_png(figure)
    with atomic_write(path) as file:
        file.write(png)


def _place(whole: tuple[int, int], left: int, top: int, width: int, height: int) -> tuple[float, float, float, float]:
    """Turn pixels from the top left into matplotlib's shares from the bottom left."""
    return left / whole[0], 1 - (top + height) / whole[1], width / whole[0], height / whole[1]


def _paint(axes: "Axes", array: "ndarray[Any, Any]", norm: Any, scale: Scale) -> None:
    import numpy as np
    from matplotlib import colormaps

    colours = colormaps[_COLOURS[scale]].with_extremes(bad=_MISSING, under=_ZERO, over=INFINITE)
    # Masked cells take the colour for missing ones; what is beyond the scale must not be masked, as a logarithm would.
    above, below = 2 * norm.vmax - norm.vmin, norm.vmin / 2
    if scale == "log":  # what is too small for the scale is still not 0
        array = np.where(array > 0, np.maximum(array, norm.vmin), np.where(np.isfinite(array), below, array))
    shown = np.where(np.isinf(array), above, array)
    cells = np.ma.masked_invalid(shown)
    axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", resample=False)


def _colour_bar(axes: "Axes", norm: Any, scale: Scale, letter: float) -> None:
    import numpy as np

    axes.imshow(np.linspace(0, 1, 256)[None], cmap=_COLOURS[scale], aspect="auto", extent=(0, 1, 0, 1))
    ticks = scale_ticks(norm, gap=letter, letter=letter)
    axes.set_xticks([float(norm(value)) for value in ticks], list(ticks.values()))
    axes.tick_params(axis="x", labelsize=9, bottom=False, labelbottom=False, top=True, labeltop=True, pad=1)
    axes.set_yticks([])


def _legend(bar: "Axes", array: "ndarray[Any, Any]", scale: Scale) -> None:
    """Write right of the colour bar what the colours beside its own mean, as far as they occur."""
    import numpy as np

    meanings = (
        ("no value", _MISSING, np.isnan(array).any()),
        ("0", _ZERO, scale == "log" and (np.isfinite(array) & (array <= 0)).any()),
        ("not finite", INFINITE, np.isinf(array).any()),
    )
    x = 1.04
    for meaning, colour, occurs in meanings:
        if occurs:
            bar.text(x, 0.5, "■", color=colour, fontsize=12, va="center_baseline", transform=bar.transAxes)
            bar.text(x + 0.032, 0.5, meaning, fontsize=9, va="center_baseline", transform=bar.transAxes)
            x += 0.065 + 0.015 * len(meaning)


def _row_height(rows: int) -> tuple[int, float]:
    """Choose pixels a row and points of its label, so that 300 rows still fit a picture one can scroll."""
    for most, height, font in ((25, 24, 9.0), (60, 18, 8.0), (120, 14, 7.0)):
        if rows <= most:
            return height, font
    return 11, 6.5
