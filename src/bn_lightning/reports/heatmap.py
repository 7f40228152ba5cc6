"""Heat maps as figures, pictures in memory and PNG files, without pyplot and its global state."""

import math
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy import ndarray

__all__ = ["figure_image", "heat_map", "save_png"]

_DPI = 100
_LONGEST_LABEL = 56
_MOST_TICKS = 6
_DECADES = 12
# Beside viridis, which runs from dark violet to yellow, these three cannot be taken for values.
_MISSING, _ZERO, _INFINITE = "#d0d0d0", "black", "#e3342f"
_BREAK = "white"
# A letter's share of the length of the colour bar.
_LETTER = 0.03


def heat_map(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[object],
    *,
    title: str,
    xlabel: str = "step",
    log: bool = False,
    limits: tuple[float, float] | None = None,
    breaks: Sequence[int] = (),
) -> "Figure":
    """Draw values as colours, the first row on top.

    Grey is a missing value (NaN), red an infinite one, and on a logarithmic scale black is 0 or less.

    Args:
        values: Shape (rows, columns); anything NumPy takes.
        rows: Row names; long ones are shortened in the middle.
        columns: What to write below the columns, of which a few are chosen.
        title: One line: what the colours mean, with the unit.
        xlabel: What the columns are.
        log: Whether the colours are logarithmic, over at most 12 decades.
        limits: The colour scale's ends; by default those of the finite values.
        breaks: Columns with a thin line on their left, where the distance between columns changes.

    Raises:
        ValueError: If the names do not fit the values, or there is nothing to draw.

    Example:
        >>> figure = heat_map([[1.0, 2.0]], ["conv1"], [0, 50], title="standard deviation")
        >>> figure_image(figure).shape[2]
        3
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(rows), len(columns)) or not array.size:
        raise ValueError(
            f"a heat map needs values of shape (rows, columns), at least one of each: got values of shape "
            f"{array.shape} for {len(rows)} rows and {len(columns)} columns."
        )
    row_height, font = _row_height(len(rows))
    height = len(rows) * row_height + 1.7
    figure = Figure(figsize=(10, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["viridis"].with_extremes(bad=_MISSING, under=_ZERO, over=_INFINITE)
    norm = _norm(array, log, limits)
    # Masked cells take the colour for missing ones; what is beyond the scale must not be masked, as a logarithm would.
    above, below = 2 * norm.vmax - norm.vmin, norm.vmin / 2
    shown = np.where(np.isinf(array), above, np.where(log & (array <= 0), below, array))
    cells = np.ma.masked_invalid(shown)
    mesh = axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", resample=False)
    axes.set_yticks(range(len(rows)), [_shortened(name) for name in rows], fontsize=font)
    axes.tick_params(axis="y", length=0)
    ticks = np.unique(np.linspace(0, len(columns) - 1, min(_MOST_TICKS, len(columns))).round().astype(int))
    axes.set_xticks(ticks, [str(columns[tick]) for tick in ticks], fontsize=9)
    axes.set_xlabel(xlabel, fontsize=10)
    for column in breaks:
        axes.axvline(column - 0.5, color=_BREAK, linewidth=1)
    # Above the map: in a tall picture, what the colours mean has to stand where reading begins.
    bar = figure.colorbar(mesh, ax=axes, location="top", aspect=45, fraction=0.16 / height, pad=0.1 / height)
    bar.set_label(_legend(array, log), fontsize=10)
    ends = float(norm.vmin), float(norm.vmax)
    bar_ticks = _scale_ticks(ends, _round_numbers(*ends) if log else bar.get_ticks(), norm)
    bar.set_ticks(list(bar_ticks), labels=list(bar_ticks.values()))
    bar.minorticks_off()
    figure.suptitle(title, fontsize=12)
    return figure


def figure_image(figure: "Figure") -> "ndarray[Any, Any]":
    """Render a figure of `heat_map`.

    Returns:
        Red, green and blue, uint8, shape (height, width, 3).
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG; a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`, whose files only their owner may read.
    temporary = path.parent / f".{path.stem}-{uuid.uuid4().hex}.png"
    try:
        with open(temporary, "xb") as file:
            figure.savefig(file, format="png")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _norm(array: "ndarray[Any, Any]", log: bool, limits: tuple[float, float] | None) -> Any:
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    shown = array[np.isfinite(array) & ((array > 0) | (not log))]
    low, high = limits or ((shown.min(), shown.max()) if shown.size else (1.0, 1.0))
    if log:
        low = max(low, high * 10.0**-_DECADES)
        return LogNorm(low, high if high > low else 10 * low)
    return Normalize(low, high if high > low else low + 1)


def _round_numbers(low: float, high: float) -> list[float]:
    """Choose 1, 2 and 5 of each decade, or whole decades if there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1, 2, 5) if high < 1e3 * low else (1,)
    return [digit * 10.0**decade for decade in decades for digit in leading]


def _scale_ticks(ends: tuple[float, float], round_numbers: Iterable[float], norm: Any) -> dict[float, str]:
    """Choose both ends of a scale, and those round numbers in between whose labels touch no other.

    Example:
        >>> _scale_ticks((0.0, 10.5), (5.0, 10.0), lambda value: value / 10.5)
        {0.0: '0', 5.0: '5', 10.5: '10.5'}
    """
    low, high = ends
    # Three significant digits, or as many as it takes to tell the ends apart.
    digits = next((digits for digits in range(3, 17) if f"{low:.{digits}g}" != f"{high:.{digits}g}"), 17)

    def written(value: float) -> str:
        return f"{value:.{digits}g}"

    def apart(left: float, right: float) -> bool:
        letters = (len(written(left)) + len(written(right))) / 2
        return bool(norm(right) - norm(left) > (letters + 1) * _LETTER)

    ticks = [low]
    for value in map(float, round_numbers):
        exact = abs(float(written(value)) - value) < 1e-3 * (high - low)
        if low < value < high and exact and apart(ticks[-1], value) and apart(value, high):
            ticks.append(value)
    return {value: written(value) for value in (*ticks, high)}


def _row_height(rows: int) -> tuple[float, float]:
    """Choose inches a row and points of its label, so that 300 rows still fit a picture one can scroll."""
    for most, height, font in ((25, 0.24, 9.0), (60, 0.18, 8.0), (120, 0.14, 7.0)):
        if rows <= most:
            return height, font
    return 0.11, 6.0


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST_LABEL:
        return name
    tail = 2 * _LONGEST_LABEL // 3
    return f"{name[: _LONGEST_LABEL - tail - 1]}…{name[-tail:]}"


def _legend(array: "ndarray[Any, Any]", log: bool) -> str:
    import numpy as np

    meanings = (
        ("grey: no value", np.isnan(array).any()),
        ("black: 0", log and (np.isfinite(array) & (array <= 0)).any()),
        ("red: not finite", np.isinf(array).any()),
    )
    present = ", ".join(meaning for meaning, occurs in meanings if occurs)
    return f"({present})" if present else ""
