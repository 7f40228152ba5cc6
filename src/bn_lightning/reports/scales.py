"""Colour scales: where they begin and end, what lies in the middle, and which numbers stand beside them."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy import ndarray

__all__ = ["Scale", "colour_norm", "scale_ticks"]

Scale = Literal["linear", "log", "diverging"]

_DECADES = 12
_WIDE = 100.0


def colour_norm(array: "ndarray[Any, Any]", scale: Scale, limits: tuple[float, float] | None) -> Any:
    """Return matplotlib's map from values to [0, 1].

    A diverging scale is symmetric about 0, and linear or not as `_linear_part` has it.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    shown = array[np.isfinite(array) & ((array > 0) | (scale != "log"))]
    if scale == "diverging":
        largest = float(np.abs(shown).max()) if shown.any() else 1.0
        middle = _linear_part(shown)
        if middle is None:
            return Normalize(-largest, largest)
        return SymLogNorm(middle, vmin=-largest, vmax=largest, base=10)
    low, high = limits or ((shown.min(), shown.max()) if shown.size else (1.0, 1.0))
    if scale == "log":
        low = max(low, high * 10.0**-_DECADES)
        return LogNorm(low, high if high > low else 10 * low)
    return Normalize(low, high if high > low else low + 1)


def scale_ticks(norm: Any, *, gap: float, letter: float = 0.0) -> dict[float, str]:
    """Choose both ends of a scale, 0 where it is in the middle, and round numbers whose labels touch no other.

    Args:
        norm: From `colour_norm`.
        gap: What has to lie between two labels, as a share of the length of the scale.
        letter: How wide a letter is there; 0 where labels stand one above the other.

    Example:
        >>> from matplotlib.colors import Normalize
        >>> scale_ticks(Normalize(0, 10.5), gap=0.03, letter=0.03)
        {0.0: '0', 2.0: '2', 4.0: '4', 6.0: '6', 8.0: '8', 10.5: '10.5'}
        >>> list(scale_ticks(Normalize(-7, 7), gap=0.1).values())
        ['-7', '-4', '-2', '0', '2', '4', '7']
    """
    from matplotlib.colors import LogNorm, SymLogNorm
    from matplotlib.ticker import MaxNLocator

    def locator(parts: int) -> MaxNLocator:
        return MaxNLocator(parts, steps=[1, 2, 5, 10])

    low, high = float(norm.vmin), float(norm.vmax)
    if low == -high:
        logarithmic = isinstance(norm, SymLogNorm)
        numbers = _round_numbers(norm.linthresh, high) if logarithmic else locator(4).tick_values(0, high)
        positive = _chosen(0.0, high, numbers, norm, gap, letter)
        negative = {-value: f"-{label}" for value, label in reversed(positive.items()) if value}
        return {**negative, **positive}
    logarithmic = isinstance(norm, LogNorm)
    numbers = _round_numbers(low, high) if logarithmic else locator(6).tick_values(low, high)
    return _chosen(low, high, numbers, norm, gap, letter)


def _linear_part(array: "ndarray[Any, Any]") -> float | None:
    """Find up to where a scale should be linear and beyond it logarithmic; ``None`` if it can be linear throughout.

    That is where the largest magnitude is more than 100 times that below which a tenth of them lie, zeros aside. The
    linear part ends at the latter, but at most 6 decades below the largest.

    Example:
        >>> import numpy as np
        >>> _linear_part(np.array([0.0, 5.0, -1.0, np.nan])), _linear_part(np.array([0.0, 1.0, -1000.0]))
        (None, 1.0)
    """
    import numpy as np

    sizes = np.abs(array[np.isfinite(array) & (array != 0)])
    if not sizes.size:
        return None
    largest, small = float(sizes.max()), float(np.quantile(sizes, 0.1, method="lower"))
    return max(small, 1e-6 * largest) if largest > _WIDE * small else None


def _chosen(
    low: float, high: float, numbers: Iterable[float], norm: Any, gap: float, letter: float
) -> dict[float, str]:
    # Three significant digits, or as many as it takes to tell the ends apart.
    digits = next((digits for digits in range(3, 17) if f"{low:.{digits}g}" != f"{high:.{digits}g}"), 17)

    def written(value: float) -> str:
        return f"{value:.{digits}g}"

    def apart(left: float, right: float) -> bool:
        letters = (len(written(left)) + len(written(right))) / 2
        return bool(norm(right) - norm(left) > letters * letter + gap)

    ticks = [low]
    for value in map(float, numbers):
        exact = abs(float(written(value)) - value) < 1e-3 * (high - low)
        if low < value < high and exact and apart(ticks[-1], value) and apart(value, high):
            ticks.append(value)
    return {value: written(value) for value in (*ticks, high)}


def _round_numbers(low: float, high: float) -> list[float]:
    """Choose 1, 2 and 5 of each decade, or whole decades if there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1, 2, 5) if high < 1e3 * low else (1,)
    return [digit * 10.0**decade for decade in decades for digit in leading]
