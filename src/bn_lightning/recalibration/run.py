"""The network run on a batch as its user says, and the loss that comes of it."""

import numbers
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import BatchNormError
from bn_lightning.recalibration.batches import FORWARD_CURE, cloned_from_inference, run_on

__all__ = ["Run", "as_given", "examples_in", "same_randomness"]


@dataclass(frozen=True, slots=True)
class Run:
    """How the network is run on a batch, which is moved to the network's device.

    Attributes:
        loss: A function ``(output, target) -> scalar`` for batches that are pairs, or ``None``.
        step: A function ``(model, batch) -> scalar`` that runs the network itself, or ``None``.
        forward: A function ``(model, batch) -> output``; ``None`` runs the network on the batch or its first element.
        error: What to raise if it cannot be.
        cure: What an error tells to give for batches that the network cannot be run on.

    Raises:
        BatchNormError: Of that class, if there is a ``step`` beside one of the others, which it would leave unused.
    """

    loss: Callable[[Any, Any], Any] | None = None
    step: Callable[[nn.Module, Any], Any] | None = None
    forward: Callable[[nn.Module, Any], object] | None = None
    error: type[BatchNormError] = BatchNormError
    cure: str = FORWARD_CURE

    def __post_init__(self) -> None:
        for name in ("loss", "forward"):
            if self.step is not None and getattr(self, name) is not None:
                raise self.error(
                    f"got both step= and {name}=: step runs the network and returns the loss by itself. Give step= "
                    "alone, or loss= with or without forward=."
                )

    @property
    def reads_losses(self) -> bool:
        """Whether there is a loss to read."""
        return self.loss is not None or self.step is not None

    def __call__(self, network: nn.Module, batch: Any) -> Tensor | None:
        """Run the network, and return the loss as a scalar tensor; ``None`` if there is none or the step skips it.

        Raises:
            BatchNormError: Of the given class, if the batch has no target, or what should be a loss is none.
        """
        # Containers of its own: a step that pops a batch's labels leaves them to the next pass.
        batch = _moved(cloned_from_inference(batch), _device(network))
        if self.step is not None:
            return _as_loss(self.step(network, batch), "step", self.error)
        output = run_on(network, batch, self.forward, cure=self.cure)
        if self.loss is None:
            return None
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise self.error(
                "loss= takes the output and the target of batches that are (input, target) pairs, got a batch that is "
                f"a {type(batch).__name__}. Give step=lambda model, batch: …, which returns a batch's loss, instead."
            )
        target = _moved(batch[1], output.device) if isinstance(output, Tensor) else batch[1]
        return _as_loss(self.loss(output, target), "loss", self.error)


@contextmanager
def as_given(batch: Any) -> Iterator[None]:
    """Put back what a step writes into its batch in place, so that every pass has the same samples."""
    tensors = [tensor for tensor in _tensors(batch) if not tensor.is_inference()]  # of which a step gets a clone
    kept = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, version, value in kept:
                if tensor._version != version:
                    tensor.copy_(value)


def examples_in(batch: Any) -> int:
    """Count a batch's examples: the length of the first tensor in it; 1 if that has none or there is no tensor.

    Example:
        >>> examples_in({"image": torch.zeros(8, 3), "id": ["a"]})
        8
    """
    first = next(_tensors(batch), None)
    return int(first.shape[0]) if first is not None and first.dim() else 1


def same_randomness(index: int, devices: Iterable[torch.device] = ()) -> None:
    """Begin a batch with random states that depend on its place alone: dropout in one does not shift the next one's.

    Torch's on the CPU and on the devices, those that `preserved_rng` puts back and no others; Python's; and NumPy's if
    it is loaded.
    """
    torch.default_generator.manual_seed(index)  # torch.manual_seed would reach every device there is
    for device in devices:
        backend: Any = getattr(torch, device.type, None)
        if device.type in ("cpu", "meta") or not hasattr(backend, "manual_seed"):
            continue
        with backend.device(device) if hasattr(backend, "device") else nullcontext():
            backend.manual_seed(index)
    random.seed(index)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(index)


def _as_loss(value: Any, name: str, error: type[BatchNormError]) -> Tensor | None:
    if isinstance(value, Mapping):
        if "loss" not in value:
            raise error(
                f'expected {name}= to return a scalar, or a dict with "loss", got a dict of {sorted(map(str, value))}.'
            )
        value = value["loss"]
    if value is None and name == "step":
        return None
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        what = f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            what = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
        raise error(
            f"expected {name}= to return a scalar, the mean loss of the batch, got {what}. Reduce it, as by .mean(); a "
            'step may also return a dict with "loss", or None to leave a batch out.'
        )
    return value.reshape(())


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from chain.from_iterable(map(_tensors, batch.values()))
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        yield from chain.from_iterable(map(_tensors, batch))


def _moved(value: Any, device: torch.device | None) -> Any:
    """Rebuild the usual containers with every tensor on the device, the very tensor where it is there already."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(each, device) for each in value))
    if type(value) in (tuple, list):
        return type(value)(_moved(each, device) for each in value)
    if type(value) is dict:
        return {key: _moved(each, device) for key, each in value.items()}
    return value


def _device(network: nn.Module) -> torch.device | None:
    """Return where the network is; ``None`` if it has no tensors."""
    first = next(chain(network.parameters(), network.buffers()), None)
    return None if first is None else first.device
