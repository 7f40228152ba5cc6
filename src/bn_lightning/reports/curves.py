"""Curves over one another, with the spread of each, as a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "along_layers", "curve_figure", "draw_curves", "empty_figure"]

_DPI = 100
_COLOURS = ("#1f5fa8", "#e08a1e", "#3a923a", "#b03a48", "#7a5195", "#808080", "#17a2a2", "#8c6d31")

AxisScale = Literal["linear", "log", "symlog"]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line.

    Attributes:
        label: In the legend; nothing stands there for ``""``.
        x: Where.
        y: What; NaN and infinities are gaps.
        low: The lower end of the spread at each place, if there is one.
        high: The upper end.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def curve_figure(
    curves: Sequence[Curve],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    xscale: AxisScale = "linear",
    yscale: AxisScale = "linear",
) -> "Figure":
    """Draw curves into one pair of axes, in colours that differ, few points marked.

    Raises:
        ValueError: If there is no curve.

    Example:
        >>> figure = curve_figure([Curve("loss", [1, 2], [0.5, 0.1])], title="t", xlabel="step", ylabel="loss")
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    if not curves:
        raise ValueError("a figure needs at least one curve.")
    figure = empty_figure(title)
    axes = figure.add_subplot()
    draw_curves(axes, curves, xscale=xscale, yscale=yscale)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def empty_figure(title: str, width: float = 8.4, height: float = 4.8) -> "Figure":
    """Make a figure with a title and room below, in inches; without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    return figure


def draw_curves(
    axes: "Axes", curves: Sequence[Curve], *, xscale: AxisScale = "linear", yscale: AxisScale = "linear"
) -> None:
    """Draw curves and their legend into axes that are there; where nothing is above 0 a logarithm is left out."""
    import numpy as np
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """0.2 and 100, neither 2 × 10⁻¹ and 10² nor 2e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    for index, curve in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        y = np.asarray(curve.y, dtype=np.float64)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            curve.x,
            np.where(np.isfinite(y), y, np.nan),
            color=colour,
            linewidth=1.6,
            marker="o" if len(curve.x) <= 40 else "",
            markersize=3.5,
            label=curve.label or None,
        )
    drawn = axes.dataLim
    for axis, set_scale, scale, largest in (
        (axes.xaxis, axes.set_xscale, xscale, drawn.x1),
        (axes.yaxis, axes.set_yscale, yscale, drawn.y1),
    ):
        if scale != "log" or largest > 0:
            set_scale(scale)
            if scale == "log":
                axis.set_major_formatter(Plain())
                axis.set_minor_formatter(Plain())
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if any(curve.label for curve in curves):
        axes.legend(frameon=False, fontsize=9)


def along_layers(axes: "Axes") -> None:
    """Say that what lies to the right is a later layer."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer, in order of execution")
