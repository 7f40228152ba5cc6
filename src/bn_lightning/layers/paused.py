"""Keep running statistics still during extra forward passes."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.layers.step_dependent import StepDependent
from bn_lightning.selection import require_batch_norms, unwrap

__all__ = ["paused_statistics"]


@contextmanager
def paused_statistics(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Iterator[None]:
    """Let BatchNorm layers move no running statistics and count no batch; what they compute stays the same.

    A layer in training goes on normalizing by batch statistics, one in evaluation by its running ones. For as long as
    the context lasts the layers have a momentum of 0 and copies of their buffers, which take the counting and, should
    there be one, the NaN that 0 times infinity makes; those whose training depends on the count have
    ``track_running_stats`` off. What is loaded into them then is lost, and they are not to be moved. Contexts nest.

    Activation checkpointing runs the forward pass twice. BatchNorm counts once if the second is paused:
    ``checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), paused_statistics(block)))``.
    Batch Renormalization reads the statistics that it moves, and wants the first one paused instead:
    ``(paused_statistics(block), nullcontext())``.

    Args:
        model: The network; wrappers (DDP, ``torch.compile``) are looked through.
        include: Name patterns (``fnmatch``) of the layers to pause; empty means all.
        exclude: Name patterns of the layers that go on.

    Raises:
        BatchNormError: If there is no BatchNorm layer, or a pattern matches none.

    Example:
        >>> import torch
        >>> layer = nn.BatchNorm1d(2)
        >>> with paused_statistics(layer):
        ...     _ = layer(torch.randn(4, 2))
        >>> layer.num_batches_tracked
        tensor(0)
    """
    layers = require_batch_norms(unwrap(model), include, exclude)
    with ExitStack() as stack:
        for layer in layers.values():
            if layer.running_mean is None:
                continue
            if isinstance(layer, StepDependent):  # in training it reads what the pass before has moved or counted
                stack.callback(setattr, layer, "track_running_stats", layer.track_running_stats)
                layer.track_running_stats = False
            else:
                # Not the same attribute: without buffers torch's kernel saves fewer tensors for the backward pass,
                # which checkpointing refuses, and a class of the user's may not ask whether to track.
                buffers = dict(layer._buffers)
                stack.callback(_bind, layer, buffers)
                # Such passes move the copies by nothing, so that evaluation in between goes by the same statistics.
                stack.callback(setattr, layer, "momentum", layer.momentum)
                layer.momentum = 0.0
                _bind(layer, {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
        yield


def _bind(layer: _BatchNorm, buffers: dict[str, Tensor | None]) -> None:
    layer._buffers.update(buffers)
