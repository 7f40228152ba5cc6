"""Layers that share statistics with other processes, run without them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from bn_lightning.functional import batch_moments
from bn_lightning.layers.cross_replica import CrossReplicaBatchNorm
from bn_lightning.layers.processes import count_processes

__all__ = ["by_own_batch"]


@contextmanager
def by_own_batch(network: nn.Module) -> Iterator[None]:
    """Have layers in training that would exchange statistics normalize by this process's own batch.

    Processes may then run different numbers of batches. A correction towards running statistics (``renorm``) is left
    out. One process alone changes nothing.

    Example:
        >>> with by_own_batch(nn.SyncBatchNorm(2)):
        ...     pass
    """
    with ExitStack() as stack:
        if count_processes() > 1:
            for module in network.modules():
                if isinstance(module, SyncBatchNorm | CrossReplicaBatchNorm):
                    stack.enter_context(_alone(module))
        yield


@contextmanager
def _alone(layer: _BatchNorm) -> Iterator[None]:
    held: dict[str, Tensor | None] = {}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if not layer.training or not isinstance(x, Tensor) or x.dim() < 2:
            return
        held.update(layer._buffers)
        layer.training = False
        moments = batch_moments(x)
        if layer.running_mean is not None and layer.running_var is not None and moments.count:
            mean, var = moments.mean.to(layer.running_mean), moments.var(correction=0).to(layer.running_var)
            # Others, not other values: their owner gets back the ones that were there.
            layer._buffers.update(running_mean=mean, running_var=var)

    def end(*_: Any) -> None:
        if held:
            layer._buffers.update(held)
            layer.training = True
            held.clear()

    with ExitStack() as stack:
        stack.callback(end)
        stack.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(end, always_call=True).remove)
        yield
