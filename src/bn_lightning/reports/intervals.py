"""Means with their intervals, as words and as a figure."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["interval_figure", "interval_in_words"]

_DPI = 100
# Pixels.
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 1000, 170, 220, 46, 26, 42
_DOT, _UNKNOWN = "#1f5fa8", "#808080"
_MOST_DECIMALS = 6
_WIDE = 50.0


def interval_in_words(mean: float, low: float, high: float) -> str:
    """Write a mean and its 95 % interval with as many decimals as two digits of the interval's width have.

    Example:
        >>> interval_in_words(0.3123, 0.2213, 0.4021), interval_in_words(12.0, -100.0, 140.0)
        ('0.31 [0.22, 0.40]', '12 [-100, 140]')
        >>> interval_in_words(0.25, 0.25, 0.25)
        '0.25 [0.25, 0.25]'
        >>> interval_in_words(0.25, -math.inf, math.inf)
        '0.25 (no interval)'
    """
    if not math.isfinite(mean):
        return "not finite"
    width = high - low
    if not math.isfinite(width):
        return f"{mean:.3g} (no interval)"
    values = (mean, low, high)
    decimals = max(0, 1 - math.floor(math.log10(width))) if width > 0 else None
    if decimals is None or decimals > _MOST_DECIMALS or any(abs(value) >= 1e6 for value in values):
        written = [f"{value:.3g}" for value in values]
    else:
        written = [f"{round(value, decimals) + 0.0:.{decimals}f}" for value in values]  # + 0.0: no -0.00
    return f"{written[0]} [{written[1]}, {written[2]}]"


def interval_figure(rows: Sequence[tuple[str, float, float, float]], *, title: str) -> "Figure":
    """Draw means as dots and their intervals as lines, one row each, the first on top, with the numbers beside them.

    The scale is logarithmic where all is above 0 and differs much. What is not finite is said, not drawn.

    Args:
        rows: Name, mean, lower and upper end.
        title: One line.

    Raises:
        ValueError: If there is no row.

    Example:
        >>> figure = interval_figure([("a", 1.0, 0.5, 1.5), ("b", 2.0, 1.5, 2.5)], title="t")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['1.0 [0.5, 1.5]', '2.0 [1.5, 2.5]']
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("an interval figure needs at least one row.")
    height = _TOP + _ROW * len(rows) + _BOTTOM
    figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=12 / _WIDTH, y=1 - 12 / height, ha="left", va="top", fontsize=11, parse_math=False)
    axes = figure.add_axes(
        (_LEFT / _WIDTH, _BOTTOM / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, _ROW * len(rows) / height)
    )
    ends: list[float] = []
    for place, (_, mean, low, high) in enumerate(rows):
        known = math.isfinite(mean)
        if known:
            bounded = math.isfinite(low) and math.isfinite(high)
            ends += [mean, low, high] if bounded else [mean]
            if bounded:
                axes.plot([low, high], [place, place], color=_DOT, linewidth=2)
            axes.plot([mean], [place], "o", color=_DOT, markersize=6)
        axes.text(
            1.02,
            place,
            interval_in_words(mean, low, high),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color="black" if known else _UNKNOWN,
        )
    if ends and min(ends) > 0 and max(ends) > _WIDE * min(ends):
        axes.set_xscale("log")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], parse_math=False)
    axes.tick_params(axis="both", labelsize=9, length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure
