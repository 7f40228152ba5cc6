"""Batches as users have them, and the model run on one."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import BatchNormError, RecalibrationError, first_line
from bn_lightning.selection import failing_layer

__all__ = ["FORWARD_CURE", "Forward", "checked_batches", "cloned_from_inference", "run_on"]

Forward = Callable[[nn.Module, Any], object]


def checked_batches(batches: Iterable[Any], max_batches: int) -> Iterable[Any]:
    """Refuse what is no collection of batches, or no number of them."""
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1:
        raise RecalibrationError(f"max_batches must be a positive whole number, got {max_batches!r}.")
    if isinstance(batches, Tensor | dict | str) or not isinstance(batches, Iterable):
        raise RecalibrationError(
            f"batches must be an iterable of batches (a DataLoader, a list, a generator), got a "
            f"{type(batches).__name__}. Wrap a single batch in a list: [batch]."
        )
    return batches


FORWARD_CURE = "forward=lambda model, batch: model(...)"
"""How a user says how the network is run, where the option is called so."""


def run_on(model: nn.Module, batch: Any, forward: Forward | None = None, *, cure: str = FORWARD_CURE) -> object:
    """Run the model on a batch: by ``forward``, else on the batch or its first element, moved to the model's device.

    Args:
        model: The network.
        batch: One.
        forward: A function ``(model, batch) -> output``, or ``None``.
        cure: What an error tells to give for other batches.

    Raises:
        RecalibrationError: If the batch is of unknown structure, or the model cannot take it.
    """
    batch = cloned_from_inference(batch)
    return _run_on_first(model, batch, cure) if forward is None else forward(model, batch)


def _run_on_first(model: nn.Module, batch: Any, cure: str) -> object:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        listed = isinstance(batch, tuple | list) and batch
        inside = f" whose first element is a {type(batch[0]).__name__}" if listed else ""
        raise RecalibrationError(
            f"expected a batch that is a tensor or an (input, target, …) tuple, got a {type(batch).__name__}{inside}. "
            f"Say how to run the model on it: {cure}."
        )
    first = next(chain(model.parameters(), model.buffers()), x)
    try:
        return model(x.to(first.device))
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, BatchNormError | torch.OutOfMemoryError):
            raise
        layer = failing_layer(model, error)
        raise RecalibrationError(
            f"{type(model).__name__} cannot be run on an input of shape {tuple(x.shape)} and dtype {x.dtype}"
            + (f"; it fails in layer {layer!r}" if layer else "")
            + f" with {first_line(error)}. Give batches whose first element fits its forward, or say how to run it: "
            f"{cure}."
        ) from error


def cloned_from_inference(batch: Any) -> Any:
    """Replace inference tensors, which may not be used outside inference mode, in the usual containers."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if type(batch) in (tuple, list):
        return type(batch)(map(cloned_from_inference, batch))
    if type(batch) is dict:
        return {key: cloned_from_inference(value) for key, value in batch.items()}
    return batch
