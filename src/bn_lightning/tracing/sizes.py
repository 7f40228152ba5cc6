"""Example calls of another size than the user's: what holds for one batch or image size may not hold for the next."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bn_lightning.tracing.calls import ExampleCall
from bn_lightning.tracing.nested import iter_tensors, map_tensors

__all__ = ["other_sizes"]


def other_sizes(call: ExampleCall) -> Iterator[ExampleCall]:
    """Give variants of a call, the most telling first: twice the batch and one pixel more, then twice the batch.

    A network need not take them. There are none where the tensors given have no common first axis.

    Shape:
        Axis 0 is the batch; axes from 2 on are space, in floating-point tensors.

    Example:
        >>> [str(other) for other in other_sizes(ExampleCall((torch.ones(1, 3, 8, 8),)))]
        ['(float32[2, 3, 9, 9])', '(float32[2, 3, 8, 8])']
    """
    given = list(iter_tensors((call.args, call.kwargs)))
    if not given or len({tensor.shape[:1] for tensor in given}) > 1 or not given[0].dim():
        return
    if any(tensor.is_floating_point() and tensor.dim() > 2 for tensor in given):
        yield _mapped(call, lambda tensor: _twice(_larger(tensor)))
    yield _mapped(call, _twice)


def _mapped(call: ExampleCall, function: Callable[[Tensor], Tensor]) -> ExampleCall:
    return ExampleCall(map_tensors(call.args, function), map_tensors(dict(call.kwargs or {}), function))


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def _larger(tensor: Tensor) -> Tensor:
    for axis in range(2, tensor.dim()) if tensor.is_floating_point() else ():
        tensor = torch.cat([tensor, tensor.narrow(axis, -1, 1)], axis)
    return tensor
