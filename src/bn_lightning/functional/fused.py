"""The statistics of `activation_statistics` from one compiled pass over the data."""

import functools
import time
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from bn_lightning.functional.activation import (
    SHORT,
    activation_statistics,
    outer_channel_inner,
    pool_statistics,
    squares_lost,
    statistics_block,
)
from bn_lightning.functional.moments import accumulation_dtype
from bn_lightning.internals import never_compiled

__all__ = ["FusedStatistics"]

# A compiled sum of float32 is a plain one: more rows, or values of a row in a vector's lanes, would cost digits.
_ROWS = 1 << 8
_LONGEST = 1 << 12
# Of fewer values, eager statistics take a tenth of a millisecond: not worth seconds of compiling.
_FEWEST = 1 << 15
# Each takes seconds to compile.
_MOST_KERNELS = 16

_Kernel = Callable[[Tensor], Tensor]


class FusedStatistics:
    """`activation_statistics` by ``torch.compile``: a pass costs about as much as reading the data.

    The first call with another dtype or layout compiles for seconds; sizes may change freely. Integers, small tensors,
    tensor subclasses and long rows of a prime length take the eager way. So does everything once the compiler has
    failed: nothing is raised.

    Attributes:
        reason: Why the eager way is taken from now on; empty while the compiled pass is in use.
        compile_seconds: Time that first calls have taken so far.

    Example:
        >>> FusedStatistics()(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))[1]  # too few values to compile for
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.reason = ""
        self.compile_seconds = 0.0
        self._ready: set[tuple[object, ...]] = set()

    @never_compiled  # a network that is being compiled around a tap must not swallow the pass
    def __call__(self, x: Tensor, *, channel_dim: int = 1) -> Tensor:
        """Measure each channel of one activation; arguments and result as in `activation_statistics`."""
        if self.reason or type(x) is not Tensor or not x.is_floating_point() or x.numel() < _FEWEST:
            return activation_statistics(x, channel_dim=channel_dim)
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            # One state for all calls: the compiler's guards would compile again for another.
            with torch.inference_mode(False), torch.no_grad():
                return self._measure(x, channel_dim)
        return self._measure(x, channel_dim)

    def _measure(self, x: Tensor, channel_dim: int) -> Tensor:
        values = outer_channel_inner(x.detach(), channel_dim).contiguous()
        parts = _equal_parts(values.shape[2])
        if not parts:
            return activation_statistics(x, channel_dim=channel_dim)
        kernel, pieces = _pieces(values if parts == 1 else values.view(len(values), values.shape[1] * parts, -1))
        import torch._dynamo.config as settings  # not before it is used: seconds

        static = settings.assume_static_by_default
        try:
            blocks = [self._run(kernel, piece) for piece in pieces]
        except Exception as error:  # whatever the compiler raises, training goes on
            settings.assume_static_by_default = static  # left changed where torch.compile(dynamic=True) raises
            self.reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return activation_statistics(x, channel_dim=channel_dim)
        block = blocks[0] if len(blocks) == 1 else pool_statistics(torch.stack(blocks, dim=1))
        if squares_lost(values, block):
            return activation_statistics(x, channel_dim=channel_dim)
        return block if parts == 1 else pool_statistics(block.view(len(block), -1, parts).movedim(2, 1))

    def _run(self, kernel: _Kernel, piece: Tensor) -> Tensor:
        # A size of 1 is a constant to the compiler.
        key = (kernel, piece.dtype, piece.device.type, *(size == 1 for size in piece.shape))
        if key in self._ready:
            return _compiled(*key)(piece)
        if len(self._ready) >= _MOST_KERNELS:
            raise RuntimeError(f"more than {_MOST_KERNELS} dtypes and layouts to compile for")
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block = _compiled(*key)(piece)
        self.compile_seconds += time.perf_counter() - started
        self._ready.add(key)
        return block


@functools.cache
def _compiled(kernel: types.FunctionType, *specialized: object) -> _Kernel:
    """Compile a kernel for one dtype and layout, once in a process."""
    # The compiler counts recompilations by code object: with its own, a kernel stays clear of the user's limit.
    own = types.FunctionType(kernel.__code__.replace(), kernel.__globals__, kernel.__name__)
    return torch.compile(own, dynamic=True, fullgraph=True)


@functools.cache
def _equal_parts(length: int) -> int:
    """Count the equal parts, at most `_LONGEST` and at least `SHORT` long, that a long row falls into; 0 if none do."""
    if length <= _LONGEST:
        return 1
    fewest = -(-length // _LONGEST)
    return next((parts for parts in range(fewest, length // SHORT + 1) if length % parts == 0), 0)


def _pieces(values: Tensor) -> tuple[_Kernel, list[Tensor]]:
    """Choose the kernel for (N, C, I), and the views it reads: what does not fill whole groups is a view of its own."""
    outer, channels, inner = values.shape
    if inner >= SHORT:
        return _along_last, [values]
    full = outer // _ROWS * _ROWS
    main, rest = values[:full], values[full:]
    if channels * inner == 1:
        return _along_last, [part.view(-1, 1, size) for part, size in ((main, _ROWS), (rest, len(rest))) if len(part)]
    groups = [part.view(-1, size, channels, inner) for part, size in ((main, _ROWS), (rest, len(rest))) if len(part)]
    return _along_first, groups


def _along_last(x: Tensor) -> Tensor:
    """Measure (N, C, I) row by row."""
    return pool_statistics(_reduced(x, 2))


def _along_first(x: Tensor) -> Tensor:
    """Measure (G, R, C, I), of which C·I lie side by side in a vector, down the R rows of each group."""
    return pool_statistics(pool_statistics(_reduced(x, 1)).movedim(2, 1))


def _reduced(x: Tensor, axis: int) -> Tensor:
    """Measure along an axis, in two passes of which the second finds the data in the processor's cache."""
    wide = accumulation_dtype(x.device)
    count = x.shape[axis]
    if x.element_size() < 4:
        x = x.float()
    smallest, largest = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    # Divided before they are added, which large values would otherwise not survive. Rounding must not carry the mean
    # of equal values away from them, and about an infinite mean every value would be NaN.
    mean = (x * (1.0 / count)).sum(axis, keepdim=True).clamp(smallest, largest)
    mean = torch.where(mean - mean == 0, mean, 0.0)
    deviations = x - mean
    return statistics_block(
        count,
        mean.squeeze(axis).to(wide),
        deviations.sum(axis).to(wide),
        deviations.square().sum(axis).to(wide),
        smallest.squeeze(axis).to(wide),
        largest.squeeze(axis).to(wide),
        (x == 0).to(x.dtype).sum(axis).to(wide),
        (x - x != 0).to(x.dtype).sum(axis).to(wide),
    )
