"""Histograms on a logarithmic scale, read off the bits of float32, that merge by adding."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bn_lightning.functional.activation import outer_channel_inner

__all__ = ["BINS", "RawHistogram", "log2_histogram", "raw_histogram"]

BINS = 512
_SIGN = 256
_NONFINITE = 255
_BIAS = 127
# A chunk and its bin numbers stay in the processor's cache.
_CHUNK = 1 << 17
# Histograms side by side on a GPU, where neighbours that add to the same bin would wait for each other.
_LANES = 256


def log2_histogram(x: Tensor) -> Tensor:
    """Count values by sign and power of two, without a host sync.

    The bin is the top nine bits of a float32, 256·sign + exponent: bin ``e`` in 1 … 254 holds 2**(e-127) ≤ x <
    2**(e-126), bin 0 zero and denormals, bin 255 infinity and NaN; 256 higher come the negative ones. Histograms of
    several tensors merge by adding.

    Half precision is exact. Integers beyond 2²⁴ and float64 are rounded to float32: a value just below a power of two
    may be counted above it, float64 beyond 3.4e38 as infinite and below 1.2e-38 as 0.

    Args:
        x: Floating, integer or boolean, of any shape and memory format.

    Returns:
        Counts, int64, on the device of ``x``.

    Shape:
        (512,).

    Example:
        >>> log2_histogram(torch.tensor([1.0, 1.5, 2.0]))[127:129]
        tensor([2, 1])
    """
    # Order does not matter, so a channels_last tensor is read where it lies.
    values = outer_channel_inner(x.detach(), 1).reshape(-1) if x.numel() else x.detach().reshape(-1)
    if x.device.type != "cpu":
        return _counted_in_lanes(_bin_numbers(values))
    counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    for chunk in values.split(_CHUNK):
        counts += torch.bincount(_bin_numbers(chunk), minlength=BINS)
    return counts


def _bin_numbers(values: Tensor) -> Tensor:
    return values.float().view(torch.int32).bitwise_right_shift(23).bitwise_and_(BINS - 1)


def _counted_in_lanes(bins: Tensor) -> Tensor:
    """Count without ``bincount``, which waits for the device to learn how many bins there are."""
    lanes = torch.arange(len(bins), device=bins.device).remainder_(_LANES).mul_(BINS).add_(bins)
    counts = torch.zeros(_LANES * BINS, dtype=torch.int64, device=bins.device)
    counts.index_add_(0, lanes, torch.ones_like(lanes))
    return counts.view(_LANES, BINS).sum(0)


@dataclass(frozen=True, slots=True)
class RawHistogram:
    """What TensorBoard's ``SummaryWriter.add_histogram_raw`` takes, and how many values it leaves out.

    Attributes:
        min: Lower end of the lowest bin that is not empty.
        max: Upper end of the highest one.
        num: Finite values.
        sum: Estimated as if every value lay in the middle of its bin, as is the next.
        sum_squares: Sum of squares.
        bucket_limits: Upper ends of the buckets, ascending.
        bucket_counts: Values in each bucket; the first and the last are not empty.
        nonfinite: Values that are NaN or infinite, in no bucket.
    """

    min: float
    max: float
    num: int
    sum: float
    sum_squares: float
    bucket_limits: tuple[float, ...]
    bucket_counts: tuple[int, ...]
    nonfinite: int

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``add_histogram_raw`` that follow the tag.

        Example:
            >>> raw_histogram(log2_histogram(torch.tensor([3.0]))).arguments()["bucket_limits"]
            [4.0]
        """
        arguments = asdict(self)
        del arguments["nonfinite"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def raw_histogram(counts: Tensor) -> RawHistogram:
    """Turn counts of `log2_histogram` into buckets from the lowest bin that is not empty to the highest one.

    Zeros and denormals of both signs are one bucket. Where nothing is finite, one empty bucket is left. Exact ``min``,
    ``max`` and sums, where they are known, go in by ``dataclasses.replace``.

    Shape:
        ``counts``: (512,).

    Example:
        >>> histogram = raw_histogram(log2_histogram(torch.tensor([-3.0, 0.0, torch.nan])))
        >>> histogram.min, histogram.max < 1e-37, histogram.num, histogram.nonfinite
        (-4.0, True, 2, 1)
    """
    positive, negative = counts[:_SIGN].tolist(), counts[_SIGN:].tolist()
    ends = [2.0 ** (exponent - _BIAS) for exponent in range(1, _NONFINITE + 1)]
    above = list(zip(ends[:-1], ends[1:], positive[1:_NONFINITE], strict=True))
    below = [(-high, -low, count) for low, high, count in zip(ends[:-1], ends[1:], negative[1:_NONFINITE], strict=True)]
    buckets = [*reversed(below), (-ends[0], ends[0], negative[0] + positive[0]), *above]
    occupied = [place for place, (*_, count) in enumerate(buckets) if count]
    buckets = buckets[occupied[0] : occupied[-1] + 1] if occupied else [(0.0, 0.0, 0)]
    middles = [((low + high) / 2, count) for low, high, count in buckets]
    return RawHistogram(
        min=buckets[0][0],
        max=buckets[-1][1],
        num=sum(count for *_, count in buckets),
        sum=sum(middle * count for middle, count in middles),
        sum_squares=sum(middle * middle * count for middle, count in middles),
        bucket_limits=tuple(high for _, high, _ in buckets),
        bucket_counts=tuple(count for *_, count in buckets),
        nonfinite=positive[_NONFINITE] + negative[_NONFINITE],
    )
