"""Bring a tensor to the host without waiting for the device."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["copy_to_host"]


def copy_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor, and return what gives it, waiting for the device only then if it has to.

    Example:
        >>> finish = copy_to_host(torch.ones(2))
        >>> finish()
        tensor([1., 1.])
    """
    if tensor.device.type != "cuda":
        host = tensor.detach().to("cpu", copy=True)
        return lambda: host
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    pinned.copy_(tensor.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def finish() -> Tensor:
        copied.synchronize()
        return pinned

    return finish
