"""Mean, spread and zeros along the layers of a network, as a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bn_lightning.reports.heatmap import INFINITE
from bn_lightning.reports.scales import colour_norm, scale_ticks
from bn_lightning.reports.shortened import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy import ndarray

__all__ = ["Profile", "profile_figure"]

_DPI = 100
# Pixels.
_LEFT, _RIGHT, _TOP, _WIDTH, _UPPER, _LOWER, _BETWEEN, _BOTTOM = 110, 60, 70, 860, 250, 170, 34, 20
_LABEL, _NARROWEST_LABEL = 7.5, 13
_MOST_DOTS = 60
_BLUE, _ORANGE, _FAINT = "#1f5fa8", "#e08a1e", "#808080"


@dataclass(frozen=True, slots=True)
class Profile:
    """What is drawn of a network, one value a layer; NaN where there is none.

    Attributes:
        mean: Any unit.
        std: The same unit.
        zero_fraction: Of 1.
    """

    mean: Sequence[float]
    std: Sequence[float]
    zero_fraction: Sequence[float]


def profile_figure(
    names: Sequence[str],
    profile: Profile,
    *,
    title: str,
    unit: str,
    nonfinite: Sequence[bool] = (),
    earlier: tuple[str, Profile] | None = None,
) -> "Figure":
    """Draw layers from left to right: mean ± standard deviation above, that on a logarithmic scale and zeros below.

    Args:
        names: Layers in order; long ones are shortened in the middle, and of many layers only some are named.
        profile: What is drawn.
        title: One line.
        unit: Of the means and standard deviations.
        nonfinite: Layers to mark.
        earlier: Its name and the same layers' values at another time, drawn faintly.

    Raises:
        ValueError: If there is no layer.

    Example:
        >>> profile = Profile([0.0, 0.1], [1.0, 0.5], [0.0, 0.5])
        >>> figure = profile_figure(["conv", "relu"], profile, title="t", unit="activation units")
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['mean ± std', 'std', 'zeros']

    Reference:
        Brock, De & Smith, Characterizing signal propagation to close the performance gap in unnormalized ResNets,
        ICLR 2021, §3.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bn_lightning.reports.labels import Labels, labels_width

    if not names:
        raise ValueError("a profile needs at least one layer.")
    every = math.ceil(len(names) * _NARROWEST_LABEL / _WIDTH)
    named = range(0, len(names), every)
    labels = [shortened(names[index], 40) for index in named]
    under = labels_width(labels, _LABEL, _DPI) + _BOTTOM
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _UPPER + _BETWEEN + _LOWER + under
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=12 / width, y=1 - 12 / height, ha="left", va="top", fontsize=12, parse_math=False)
    left, share = _LEFT / width, _WIDTH / width
    lower_place = left, under / height, share, _LOWER / height
    upper = figure.add_axes((left, (under + _LOWER + _BETWEEN) / height, share, _UPPER / height))
    lower = figure.add_axes(lower_place)
    zeros = figure.add_axes(lower_place, frameon=False)

    x, marks = np.arange(len(names)), np.flatnonzero(np.asarray(nonfinite, dtype=bool))
    for axes in (upper, lower, zeros):
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xticks([])
    _draw_spread(upper, x, profile, earlier)
    _draw_sizes(lower, zeros, x, profile, earlier)
    for axes in (upper, lower):
        label = f"not finite, first {shortened(names[marks[0]], 40)}" if marks.size and axes is upper else None
        axes.broken_barh(
            [(mark - 0.5, 1) for mark in marks],
            (0, 1),
            transform=axes.get_xaxis_transform(),
            color=INFINITE,
            label=label,
        )
    upper.set_ylabel("mean ± std", fontsize=10)
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9, borderpad=0.2)
    figure.text(1 - 12 / width, 1 - 14 / height, unit, ha="right", va="top", fontsize=9, color=_FAINT)
    Labels(lower, labels, list(named), size=_LABEL, upright=True)
    return figure


def _draw_spread(axes: "Axes", x: "ndarray[Any, Any]", profile: Profile, earlier: tuple[str, Profile] | None) -> None:
    import numpy as np
    from matplotlib.colors import SymLogNorm

    mean, std = _finite(profile.mean), _finite(profile.std)
    everything = [mean - std, mean + std]
    axes.axhline(0, color="black", linewidth=0.6)
    axes.fill_between(x, mean - std, mean + std, color=_BLUE, alpha=0.2, linewidth=0, label="± std")
    axes.plot(x, mean, color=_BLUE, linewidth=1.4, marker=_marker(x), markersize=3, label="mean")
    if earlier is not None:
        before, deviation = _finite(earlier[1].mean), _finite(earlier[1].std)
        everything += [before - deviation, before + deviation]
        axes.plot(x, before, color=_FAINT, linewidth=1, label=earlier[0])
    # Not the means themselves: behind a BatchNorm they are near 0, which is no reason for a logarithm.
    norm = colour_norm(np.concatenate(everything), "diverging", None)
    logarithmic = isinstance(norm, SymLogNorm)
    if logarithmic:
        axes.set_yscale("symlog", linthresh=norm.linthresh)
    end = norm.vmax * (1.5 if logarithmic else 1.1)
    axes.set_ylim(-end, end)
    _number(axes, norm, _UPPER)


def _draw_sizes(
    axes: "Axes", zeros: "Axes", x: "ndarray[Any, Any]", profile: Profile, earlier: tuple[str, Profile] | None
) -> None:
    import numpy as np
    from matplotlib.ticker import NullLocator

    std = _finite(profile.std)
    zeros.stairs(_finite(profile.zero_fraction), np.arange(len(x) + 1) - 0.5, fill=True, color=_ORANGE, alpha=0.35)
    zeros.set_ylim(0, 1)
    zeros.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    zeros.yaxis.tick_right()
    zeros.yaxis.set_label_position("right")
    zeros.set_ylabel("zeros", fontsize=10, color=_ORANGE)
    zeros.tick_params(axis="y", labelsize=9, colors=_ORANGE)
    drawn = [std]
    if earlier is not None:
        drawn.append(_finite(earlier[1].std))
        axes.plot(x, _positive(drawn[-1]), color=_FAINT, linewidth=1)
    axes.plot(x, _positive(std), color=_BLUE, linewidth=1.4, marker=_marker(x), markersize=3)
    constant = x[std == 0]
    if constant.size:
        axes.plot(constant, np.full(constant.size, 0.04), "v", color=_BLUE, transform=axes.get_xaxis_transform())
    norm = colour_norm(np.concatenate(drawn), "log", None)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    margin = (norm.vmax / norm.vmin) ** 0.08
    axes.set_ylim(norm.vmin / margin, norm.vmax * margin)
    _number(axes, norm, _LOWER)
    axes.set_ylabel("std" + (" (▼ 0)" if constant.size else ""), fontsize=10, color=_BLUE)
    axes.tick_params(axis="y", colors=_BLUE)
    # The line stands before the bars, whose axes would otherwise lie on it.
    axes.set_zorder(1)
    axes.patch.set_visible(False)


def _number(axes: "Axes", norm: Any, height: int) -> None:
    """Write the smallest and the largest value beside a panel, and what lies between."""
    ticks = scale_ticks(norm, gap=18 / height)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", labelsize=9)


def _finite(values: Sequence[float]) -> "ndarray[Any, Any]":
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _positive(values: "ndarray[Any, Any]") -> "ndarray[Any, Any]":
    import numpy as np

    return np.where(values > 0, values, np.nan)


def _marker(x: "ndarray[Any, Any]") -> str:
    return "o" if len(x) <= _MOST_DOTS else ""
