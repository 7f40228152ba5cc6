"""Example calls of other sizes than the user's: what holds for one batch or image size may not hold for the next."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bn_lightning.tracing.calls import ExampleCall
from bn_lightning.tracing.nested import iter_tensors, map_tensors

__all__ = ["other_sizes"]

# Some networks take even sizes only, some multiples of 4 or 32.
_MORE = (1, 2, 4, 32)


def other_sizes(call: ExampleCall) -> list[list[ExampleCall]]:
    """Give two kinds of variants of a call: larger, and smaller. Of each, the most telling first.

    Larger are another number of examples, two or three, and some pixels more, or else that number alone. Smaller are a
    single example and a pixel less, or else a single example. A network need not take them. There are none where the
    tensors that are given have no common first axis. On an accelerator no image grows: to read beyond a table of
    positions would stop the device for good.

    Shape:
        Axis 0 is the batch; space are the axes from 2 on, in whole numbers from 1 on.

    Example:
        >>> for variants in other_sizes(ExampleCall((torch.ones(4, 3, 8),))):
        ...     print(*variants)
        (float32[2, 3, 9]) (float32[2, 3, 10]) (float32[2, 3, 12]) (float32[2, 3, 40]) (float32[2, 3, 8])
        (float32[1, 3, 7]) (float32[1, 3, 8])
    """
    given = list(iter_tensors((call.args, call.kwargs)))
    if not given or any(tensor.is_nested or tensor.layout != torch.strided or not tensor.dim() for tensor in given):
        return []
    if len({len(tensor) for tensor in given}) > 1 or not len(given[0]):
        return []
    # Of few examples, for what a layer does to one it does to all: a large batch would only take its time.
    several = _mapped(call, partial(_repeated, times=3 if len(given[0]) == 2 else 2))
    larger = [several]
    if all(tensor.device.type == "cpu" for tensor in given):
        larger = [_mapped(several, partial(_resized, by=more)) for more in _MORE] + larger
    single = _mapped(call, lambda tensor: tensor[:1])
    smaller = [_mapped(single, partial(_resized, by=-1)), single]
    known = {str(call)}
    return [list(_new(variants, known)) for variants in (larger, smaller)]


def _new(variants: list[ExampleCall], known: set[str]) -> Iterator[ExampleCall]:
    for variant in variants:
        if str(variant) not in known:
            known.add(str(variant))
            yield variant


def _mapped(call: ExampleCall, function: Callable[[Tensor], Tensor]) -> ExampleCall:
    return ExampleCall(map_tensors(call.args, function), map_tensors(dict(call.kwargs or {}), function))


def _repeated(tensor: Tensor, *, times: int) -> Tensor:
    return torch.cat([tensor[:1]] * times)


def _resized(tensor: Tensor, *, by: int) -> Tensor:
    for axis in range(2 if tensor.is_floating_point() or tensor.is_complex() else 1, tensor.dim()):
        last = tensor.narrow(axis, -1, 1)
        if by > 0:
            tensor = torch.cat([tensor, *[last] * by], axis)
        elif tensor.shape[axis] > -by:
            tensor = tensor.narrow(axis, 0, tensor.shape[axis] + by)
    return tensor
