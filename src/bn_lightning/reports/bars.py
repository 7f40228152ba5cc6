"""One bar a layer, from the first to the last, with the bounds that give them their colours."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bn_lightning.reports.heatmap import INFINITE
from bn_lightning.reports.scales import colour_norm, scale_ticks
from bn_lightning.reports.shortened import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bar_figure"]

_DPI = 100
# Pixels.
_LEFT, _RIGHT, _WIDTH, _HEIGHT, _TITLE, _KEY, _LANE, _BOTTOM = 70, 110, 860, 260, 44, 17, 14, 16
_LABEL, _NARROWEST_LABEL = 7.5, 13
_COLOURS = ("#9fb6cd", "#5b8fc7", "#e08a1e", "#c8322b")
_MOST_MARKED, _LANES = 5, 3
# Above the lowest bound by more than this, a linear scale would hide what lies near it.
_WIDE = 20.0


def bar_figure(
    names: Sequence[str],
    values: Sequence[float | None],
    *,
    title: str,
    ylabel: str,
    bounds: Sequence[tuple[str, float]],
) -> "Figure":
    """Draw values as bars, left to right; the largest are numbered, and named with their values above.

    The scale is logarithmic where a value is far above the lowest bound, and shows at least that bound, so that noise
    looks like noise. Of many bars only some are named below.

    Args:
        names: Bar names; long ones are shortened in the middle.
        values: 0 or more; ``None`` leaves a place empty, and one that is not finite reaches the top in pink.
        title: One line.
        ylabel: What the values are, with the unit.
        bounds: One to three names and values, ascending: lines across, from which on bars change colour.

    Raises:
        ValueError: If there is no bar, or the values are not as many as the names.

    Example:
        >>> figure = bar_figure(["a", "b"], [0.01, 0.5], title="t", ylabel="gap", bounds=[("info", 0.1)])
        >>> [text.get_text() for text in figure.texts]
        ['t', '1  b: 0.5']
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bn_lightning.reports.labels import Labels, labels_width

    if not names or len(names) != len(values):
        raise ValueError(f"expected at least one bar and as many values as names, got {len(names)} and {len(values)}.")
    marked = _marked(values, bounds[0][1])
    every = math.ceil(len(names) * _NARROWEST_LABEL / _WIDTH)
    below = range(0, len(names), every)
    labels = [shortened(names[index], 40) for index in below]
    lanes = _lanes(marked, len(names))
    top = _TITLE + _KEY * max(1, len(marked)) + _LANE * (1 + max(lanes, default=0)) + 8
    under = labels_width(labels, _LABEL, _DPI) + _BOTTOM
    width, height = _LEFT + _WIDTH + _RIGHT, top + _HEIGHT + under
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=12 / width, y=1 - 12 / height, ha="left", va="top", fontsize=11, parse_math=False)
    axes = figure.add_axes((_LEFT / width, under / height, _WIDTH / width, _HEIGHT / height))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks([])
    low, high = _scale(axes, values, bounds)

    for place, value in enumerate(values):
        if value is not None:
            known = math.isfinite(value)
            colour = _COLOURS[sum(value >= bound for _, bound in bounds)] if known else INFINITE
            axes.bar(place, (max(value, low) if known else high) - low, bottom=low, width=0.8, color=colour)
    for _, bound in bounds:
        axes.axhline(bound, color="#606060", linewidth=0.8, linestyle=":")
    _name_bounds(axes, bounds)
    for number, place in enumerate(marked, 1):
        value = values[place]
        assert value is not None
        written = f"{value:.2g}" if math.isfinite(value) else "not finite"
        told = f"{number}  {shortened(names[place], 90)}: {written}"
        y = 1 - (_TITLE + _KEY * (number - 1)) / height
        figure.text(_LEFT / width, y, told, fontsize=9, va="top", parse_math=False)
    for number, (place, lane) in enumerate(zip(marked, lanes, strict=True), 1):
        y = 1 + (lane * _LANE + 2) / _HEIGHT
        axes.text(place, y, str(number), transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8.5)
    drawn = [value for value in values if value is not None]
    if drawn and all(value < bounds[0][1] for value in drawn):
        axes.text(0.5, 0.5, f"all below {bounds[0][1]:g}", transform=axes.transAxes, ha="center", color="#606060")
    axes.set_ylabel(ylabel, fontsize=10, parse_math=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    Labels(axes, labels, list(np.asarray(below)), size=_LABEL, upright=True)
    return figure


def _marked(values: Sequence[float | None], noteworthy: float) -> list[int]:
    """Return the places of the largest noteworthy values, or of the largest alone; unknown ones come first."""

    def size(place: int) -> float:
        value = values[place]
        return -1.0 if value is None else value if math.isfinite(value) else math.inf

    order = sorted(range(len(values)), key=lambda place: -size(place))
    return [place for place in order if size(place) >= noteworthy][:_MOST_MARKED] or [
        place for place in order[:1] if size(place) > 0
    ]


def _scale(axes: "Axes", values: Sequence[float | None], bounds: Sequence[tuple[str, float]]) -> tuple[float, float]:
    import numpy as np
    from matplotlib.ticker import NullLocator

    least = bounds[0][1]
    largest = max([value for value in values if value is not None and math.isfinite(value)], default=0.0)
    if largest > _WIDE * least:
        low, high = least / 100, largest * 1.3
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        norm = colour_norm(np.asarray([low, largest]), "log", (low, largest))
    else:
        low, high = 0.0, 1.15 * max(largest, least)
        norm = colour_norm(np.asarray([0.0]), "linear", (0.0, max(largest, least)))
    axes.set_ylim(low, high)
    ticks = scale_ticks(norm, gap=18 / _HEIGHT)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", labelsize=9)
    return low, high


def _name_bounds(axes: "Axes", bounds: Sequence[tuple[str, float]]) -> None:
    """Name the bounds that are in sight at the right, none upon another."""
    low, high = axes.get_ylim()
    taken = -math.inf
    for name, bound in bounds:
        if low <= bound <= high:
            y = float(axes.transAxes.inverted().transform(axes.transData.transform((0.0, bound)))[1])
            taken = max(y, taken + 14 / _HEIGHT)
            options: dict[str, Any] = {"va": "center", "fontsize": 8, "parse_math": False, "color": "#404040"}
            axes.text(1.008, taken, f"{name} ≥ {bound:g}", transform=axes.transAxes, **options)


def _lanes(marked: Sequence[int], bars: int) -> list[int]:
    """Choose a height for each number above the bars, so that neighbours stand one above the other."""
    apart = 12 * bars / _WIDTH
    last = [-math.inf] * _LANES
    chosen: dict[int, int] = {}
    for place in sorted(marked):
        free = [lane for lane in range(_LANES) if place - last[lane] >= apart]
        lane = free[0] if free else min(range(_LANES), key=last.__getitem__)
        last[lane], chosen[place] = place, lane
    return [chosen[place] for place in marked]
