"""Heat maps as figures, pictures in memory and PNG files, without pyplot and its global state."""

import math
import os
import tempfile
from collections.abc import Sequence
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


def heat_map(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[object],
    *,
    title: str,
    label: str,
    xlabel: str = "step",
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """Draw values as colours, the first row on top.

    Grey is a missing value (NaN), red an infinite one, and on a logarithmic scale black is 0 or less.

    Args:
        values: Shape (rows, columns); anything NumPy takes.
        rows: Row names; long ones are shortened in the middle.
        columns: What to write below the columns, of which a few are chosen.
        title: One line.
        label: What the colours mean, with the unit.
        xlabel: What the columns are.
        log: Whether the colours are logarithmic, over at most 12 decades.
        limits: The colour scale's ends; by default those of the finite values.

    Raises:
        ValueError: If the names do not fit the values, or there is nothing to draw.

    Example:
        >>> figure = heat_map([[1.0, 2.0]], ["conv1"], [0, 50], title="spread", label="std")
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
    # Above the map: in a tall picture, what the colours mean has to stand where reading begins.
    bar = figure.colorbar(mesh, ax=axes, location="top", aspect=45, fraction=0.16 / height, pad=0.1 / height)
    bar.set_label("  ".join(filter(None, [label, _legend(array, log)])), fontsize=10)
    if log:
        values = _log_ticks(norm.vmin, norm.vmax)
        bar.set_ticks(values, labels=[f"{value:.3g}" for value in values])
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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".png")
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose round numbers: 1, 2 and 5 of each decade, or whole decades if there are many."""
    import numpy as np

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1, 2, 5) if high < 1e3 * low else (1,)
    round_numbers = [digit * 10.0**decade for decade in decades for digit in leading]
    inside = [value for value in round_numbers if low <= value <= high]
    return inside if len(inside) > 1 else [float(value) for value in np.geomspace(low, high, 3)]


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
