"""Seven mergeable statistics of each channel of an activation, without a host sync."""

import math
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

from bn_lightning.functional.moments import accumulation_dtype

__all__ = ["Row", "activation_statistics", "empty_statistics", "pool_statistics"]

# A chunk and its scratch stay in the processor's cache; larger ones cost a factor of three on a CPU.
_CHUNK = 1 << 19
# Values of all channels together that a shift is taken from.
_FIRST = 1 << 17
# Below that, a float32 square has lost digits to the end of its range.
_SMALL_SQUARE = 1e-31
# Float32 adds ones exactly up to here.
_EXACT = 1 << 24
# Reductions along a last axis shorter than this are up to five times slower than along the first one.
SHORT = 64


class Row(IntEnum):
    """The rows of a block of statistics, a tensor of shape (7, C).

    ``m2`` is the sum of squared deviations from the mean. ``zeros`` counts values that are exactly 0, ``nonfinite``
    those that are NaN or infinite. ``min``, ``max``, ``mean`` and ``m2`` carry a NaN or infinity on.
    """

    COUNT = 0
    MEAN = 1
    M2 = 2
    MIN = 3
    MAX = 4
    ZEROS = 5
    NONFINITE = 6


def empty_statistics(channels: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the statistics of no values, neutral in `pool_statistics`.

    Shape:
        (7, ``channels``).

    Example:
        >>> empty_statistics(1, device=torch.device("cpu"), dtype=torch.float64)[Row.MIN].item()
        inf
    """
    block = torch.zeros(len(Row), channels, device=device, dtype=dtype)
    block[Row.MIN].fill_(torch.inf)
    block[Row.MAX].fill_(-torch.inf)
    return block


def activation_statistics(x: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Measure each channel of one activation, detached, in the rows of `Row`.

    Half precision is widened to float32 and integers to float64 before anything is added. Squares are taken about the
    mean, so a large mean does not cancel. For float32 input they are float32: on a CPU what is too large or too small
    for that is measured again in float64; elsewhere deviations beyond 1e19 give an infinite ``m2``, and those below
    1e-19 lose digits.

    Args:
        x: The activation: floating, integer or boolean, of any memory format. With fewer than two axes it is one
            channel.
        channel_dim: Axis of the channels; -1 for the output of a linear layer.

    Returns:
        The statistics in `accumulation_dtype`, on the device of ``x``.

    Shape:
        ``x``: (N, C, *) for ``channel_dim=1``. Result: (7, C).

    Example:
        >>> activation_statistics(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))[Row.MEAN]
        tensor([1., 1.], dtype=torch.float64)
    """
    wide = accumulation_dtype(x.device)
    if x.numel() == 0:
        return empty_statistics(x.shape[channel_dim] if x.dim() > 1 else 1, device=x.device, dtype=wide)
    values = outer_channel_inner(x.detach(), channel_dim)
    outer, channels, inner = values.shape
    if not x.is_floating_point():
        values = values.to(wide)
    elif x.element_size() < 4:
        values = values.float()
    shift = rough_mean(values)
    # Where all of a chunk is counted in float32, it has to stop short of 2²⁴; a GPU has no cache to stay in.
    rows = max(1, (_CHUNK if x.device.type == "cpu" else _EXACT) // (channels * inner))
    scratch = values.new_empty(min(rows, outer), channels, inner)
    sums = [part for chunk in values.split(rows) for part in _centred_sums(chunk, shift, scratch[: len(chunk)])]
    parts = torch.stack(sums).view(-1, 5, channels).to(wide)
    deviations, squares, zeros = parts[:, :3].sum(0)
    block = statistics_block(
        outer * inner,
        shift,
        deviations,
        squares,
        parts[:, 3].amin(0),
        parts[:, 4].amax(0),
        zeros,
        _nonfinite(values, rows, squares),
    )
    return activation_statistics(x.double(), channel_dim=channel_dim) if squares_lost(values, block) else block


def squares_lost(values: Tensor, block: Tensor) -> bool:
    """Tell whether float32 cannot hold the squares that a block was made of: beyond 1e38, or too small for all digits.

    On a CPU only, where a look at a value waits for nothing, and not in a compiled network, whose graph it would break.
    """
    if values.dtype != torch.float32 or values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    small = (block[Row.M2] < block[Row.COUNT] * _SMALL_SQUARE) & (block[Row.MAX] > block[Row.MIN])
    return bool(small.any()) or not math.isfinite(block[Row.M2].sum())


def statistics_block(
    count: int,
    shift: Tensor,
    deviations: Tensor,
    squares: Tensor,
    smallest: Tensor,
    largest: Tensor,
    zeros: Tensor,
    nonfinite: Tensor,
) -> Tensor:
    """Arrange what was added up about a shift in the rows of `Row`.

    Shape:
        All tensors: (C,), in the dtype of ``deviations`` save for ``shift``. Result: (7, C).
    """
    rest = deviations / count  # what is left of the mean after rounding the shift: at 1e4 float32 rounds by 5e-4
    mean, m2 = shift + rest, (squares - rest * deviations).clamp_(min=0)
    return torch.stack([torch.full_like(rest, count), mean, m2, smallest, largest, zeros, nonfinite])


def pool_statistics(parts: Tensor) -> Tensor:
    """Merge statistics of disjoint samples, of whatever sizes, by Chan's formula.

    Args:
        parts: The samples' statistics along axis 1; empty ones are neutral.

    Shape:
        ``parts``: (7, G, *). Result: (7, *).

    Example:
        >>> one, two = (activation_statistics(torch.full((n, 1), v)) for n, v in ((1, 0.0), (3, 4.0)))
        >>> pool_statistics(torch.stack([one, two], dim=1))[:3, 0]
        tensor([ 4.,  3., 12.], dtype=torch.float64)

    Reference:
        Chan, Golub & LeVeque, The American Statistician 37(3), 1983, eq. 2.1.
    """
    if parts.shape[1] == 0:
        nothing = empty_statistics(math.prod(parts.shape[2:]), device=parts.device, dtype=parts.dtype)
        return nothing.reshape(len(Row), *parts.shape[2:])
    count = parts[Row.COUNT]
    total = count.sum(0)
    mean = (parts[Row.MEAN] * (count / total.clamp(min=1))).sum(0)
    between = (count * (parts[Row.MEAN] - mean).square()).sum(0)
    return torch.stack(
        [
            total,
            mean,
            parts[Row.M2].sum(0) + between,
            parts[Row.MIN].amin(0),
            parts[Row.MAX].amax(0),
            parts[Row.ZEROS].sum(0),
            parts[Row.NONFINITE].sum(0),
        ]
    )


def rough_mean(x: Tensor) -> Tensor:
    """Average the first values of each channel of (N, C, I): near enough for squares not to cancel.

    Whatever sets these apart from the others also adds to the variance, in proportion to their number.
    """
    outer, channels, inner = x.shape
    first = x[: max(1, min(outer, _FIRST // (channels * inner)))]
    # Divided before they are added, which large values would otherwise not survive. About an infinite mean every value
    # would be NaN.
    return _reduced(torch.sum, first / (len(first) * inner)).nan_to_num_(0.0, 0.0, 0.0)


def outer_channel_inner(x: Tensor, channel_dim: int) -> Tensor:
    """View ``x`` as (outer, C, inner) in memory order where strides allow, else copy."""
    if x.dim() < 2:
        return x.reshape(-1, 1, 1)
    if channel_dim != 1 or not x.is_contiguous():
        x = x.movedim(channel_dim, 1)
        # channels_last, and linear outputs: the channels lie innermost.
        last = x.movedim(1, -1)
        if last.is_contiguous():
            return last.reshape(-1, x.shape[1], 1)
    return x.reshape(x.shape[0], x.shape[1], -1)


def _centred_sums(x: Tensor, shift: Tensor, scratch: Tensor) -> list[Tensor]:
    """Sum, for each channel of (N, C, I), deviations and their squares, count zeros, find min and max: five (C,).

    One scratch tensor, as large as the chunk, serves them all and stays in the processor's cache. The operations were
    chosen by measurement (tests/benchmarks/watching.py): comparisons that write floats vectorize, while
    ``count_nonzero``, ``isfinite`` and sums of booleans are ten to a hundred times slower on a CPU.
    """
    return [
        _reduced(torch.sum, torch.sub(x, shift[:, None], out=scratch)),
        _reduced(torch.sum, scratch.mul_(scratch)),
        _reduced(torch.sum, torch.eq(x, 0, out=scratch)),
        _reduced(torch.amin, x),
        _reduced(torch.amax, x),
    ]


def _nonfinite(x: Tensor, rows: int, squares: Tensor) -> Tensor:
    """Count NaN and infinite values for each channel of (N, C, I), ``rows`` at a time.

    On a CPU, where a look at a value waits for nothing, that takes a pass only if the squares did not stay finite. In a
    compiled network a look would break the graph.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and math.isfinite(squares.sum()):
        return torch.zeros_like(squares)
    counts = [_reduced(torch.sum, (chunk - chunk).ne_(0)) for chunk in x.split(rows)]
    return torch.stack(counts).sum(0, dtype=squares.dtype)


def _reduced(reduction: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    """Reduce (N, C, I) to (C,), one axis after the other: first the one along which the reduction vectorizes."""
    outer, _, inner = x.shape
    if inner == 1:
        return reduction(x[..., 0], 0)
    if outer == 1:
        return reduction(x[0], 1)
    return reduction(reduction(x, 0), 1) if inner < SHORT else reduction(reduction(x, 2), 0)
