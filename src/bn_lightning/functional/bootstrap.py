"""Intervals for a mean of few values, by resampling them."""

import math

import torch
from torch import Tensor

__all__ = ["mean_interval"]

_RESAMPLES = 2000


def mean_interval(values: Tensor, weights: Tensor, *, seed: int = 0) -> tuple[float, float, float]:
    """Give the weighted mean of some values and its 95 % bootstrap-t interval.

    Values are drawn again with replacement, each with its weight, and each draw's mean is studentized by its own
    standard error, so that few values give as wide an interval as they should: percentiles of the means alone would be
    too narrow. The interval is at least the normal one.

    Args:
        values: (n,), independent of one another, such as losses of batches.
        weights: (n,), positive, such as examples in them.
        seed: Of the draws; the caller's random state is not touched.

    Returns:
        Mean, lower and upper end. A single value has no interval: its ends are infinite; values that are all the same
        have one of no width.

    Example:
        >>> mean_interval(torch.tensor([1.0, 1.0, 1.0]), torch.ones(3))
        (1.0, 1.0, 1.0)

    Reference:
        Efron & Tibshirani, An Introduction to the Bootstrap, 1993, §12.5 (the bootstrap-t interval).
    """
    values, weights = values.double().cpu(), weights.double().cpu()
    count = len(values)
    mean = float((values * weights).sum() / weights.sum())
    if count == 1:
        return mean, -math.inf, math.inf
    if bool((values == values[0]).all()):
        return (float(values[0]),) * 3
    error = float(_standard_error(values[None], weights[None]))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (_RESAMPLES, count), generator=generator)
    resampled, heavy = values[drawn], weights[drawn]
    means = (resampled * heavy).sum(1) / heavy.sum(1)
    errors = _standard_error(resampled, heavy)
    # A draw of one value alone, many times, says nothing of the spread; what rounding leaves of its error least.
    spread = (resampled != resampled[:, :1]).any(1)
    studentized = ((means - mean) / errors)[spread]
    known = studentized[torch.isfinite(studentized)]
    if len(known) < _RESAMPLES // 2:
        low, high = -_T_OF_ONE, _T_OF_ONE
    else:
        low, high = torch.quantile(known, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    least = _least(count)
    return mean, mean - max(high, least) * error, mean + max(-low, least) * error


# Student's t for one degree of freedom, 97.5 %.
_T_OF_ONE = 12.706


def _least(count: int) -> float:
    """Approximate Student's t at 97.5 % for count − 1 degrees of freedom, by its expansion about the normal's 1.96."""
    freedom, z = count - 1, 1.959964
    if freedom == 1:
        return _T_OF_ONE
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _standard_error(values: Tensor, weights: Tensor) -> Tensor:
    """Standard error of each row's weighted mean, (rows,)."""
    share = weights / weights.sum(1, keepdim=True)
    mean = (values * share).sum(1, keepdim=True)
    count = values.shape[1]
    return ((share * (values - mean)).square().sum(1) * count / (count - 1)).sqrt()
