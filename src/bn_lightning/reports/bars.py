"""One bar a layer, from the first to the last, with the bounds that give them their colours."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bn_lightning.reports.heatmap import INFINITE
from bn_lightning.reports.shortened import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bar_figure"]

_COLOURS = ("#9fb6cd", "#5b8fc7", "#e08a1e", "#c8322b")
_MOST_NAMES = 40


def bar_figure(
    names: Sequence[str],
    values: Sequence[float | None],
    *,
    title: str,
    ylabel: str,
    bounds: Sequence[tuple[str, float]],
) -> "Figure":
    """Draw values as bars on a logarithmic scale, left to right.

    Args:
        names: Bar names; of many only those of the largest are written.
        values: 0 or more; ``None`` leaves a gap, and one that is not finite reaches the top in pink.
        title: One line.
        ylabel: What the values are, with the unit.
        bounds: At most three names and values, ascending: lines across, above which bars change colour.

    Raises:
        ValueError: If there is no bar.

    Example:
        >>> figure = bar_figure(["a", "b"], [0.01, 0.5], title="t", ylabel="gap", bounds=[("info", 0.1)])
        >>> figure.axes[0].get_yscale()
        'log'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not names:
        raise ValueError("a bar figure needs at least one bar.")
    finite = [value for value in values if value is not None and math.isfinite(value)]
    top = 2 * max([*finite, *(bound for _, bound in bounds)], default=1.0)
    bottom = min([*(bound for _, bound in bounds), top]) / 10
    figure = Figure(figsize=(10, 3.8), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.36, 0.84, 0.53))
    for place, value in enumerate(values):
        if value is not None:
            known = math.isfinite(value)
            colour = _COLOURS[sum(value >= bound for _, bound in bounds)] if known else INFINITE
            axes.bar(place, max(value, bottom) if known else top, width=0.8, color=colour)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlim(-0.6, len(names) - 0.4)
    for name, bound in bounds:
        axes.axhline(bound, color="#606060", linewidth=0.8, linestyle=":")
        axes.text(1.005, bound, f"{name} {bound:g}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    largest = sorted(range(len(names)), key=lambda place: -_rank(values[place]))[:_MOST_NAMES]
    axes.set_xticks(sorted(largest), [shortened(names[place]) for place in sorted(largest)])
    axes.tick_params(axis="x", labelsize=7, rotation=90)
    axes.set_ylabel(ylabel, fontsize=9, parse_math=False)
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _rank(value: float | None) -> float:
    return -1.0 if value is None else value if math.isfinite(value) else math.inf
