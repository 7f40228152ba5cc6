"""The loss of one batch as a function of a network's parameters, with all else held still."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.functional import accumulation_dtype
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.paused import paused_statistics
from bn_lightning.preservation import eagerly, preserved
from bn_lightning.recalibration.run import Run, as_given, same_randomness
from bn_lightning.selection import named_batch_norms, unwrap

__all__ = ["Gradient", "Loss", "Objective", "Step", "forward_of", "norm_of", "objective_of"]

Loss = Callable[[Any, Any], Any]
Step = Callable[[nn.Module, Any], Any]
Gradient = Mapping[str, Tensor]


class Objective:
    """Evaluates the loss of a borrowed network; made by `objective_of`, without a loss by `forward_of`.

    Attributes:
        network: Unwrapped.
        parameters: Those that take gradients, by name; a shared one has one name.
        passes: How many forward passes were made.
        batch: The one to evaluate on.
        draw: Which random numbers: dropout draws the same at every point for as long as this stays the same.
    """

    def __init__(self, network: nn.Module, run: Run, batch: Any) -> None:
        self.network = network
        self.parameters = {name: each for name, each in network.named_parameters() if each.requires_grad}
        self.passes = 0
        self._run = run
        self.batch = batch
        self.draw = 0
        self._devices = {tensor.device for tensor in chain(network.parameters(), network.buffers())}

    def forward(self) -> Tensor | None:
        """Run the network on the batch, and return the loss if there is one to read."""
        same_randomness(self.draw, self._devices)
        self.passes += 1
        with as_given(self.batch):
            return self._run(self.network, self.batch)

    def loss(self) -> Tensor:
        """Return the loss, with its graph where gradients are enabled: one forward pass."""
        loss = self.forward()
        if loss is None:
            raise BatchNormError("step= returned None for the batch; expected its loss, a scalar.")
        return loss

    def value(self) -> float:
        """Return the loss: one forward pass."""
        with torch.no_grad():
            return float(self.loss())

    def gradient(self, names: Iterable[str] | None = None) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and its gradient by parameter, zeros where it does not depend on one: one backward pass.

        Args:
            names: Of the parameters; ``None`` for all.
        """
        parameters = self.parameters if names is None else {name: self.parameters[name] for name in names}
        with torch.enable_grad():
            loss = self.loss()
            gradients = self.gradients_of(loss, list(parameters.values()))
        found = zip(parameters.items(), gradients, strict=True)
        return float(loss.detach()), {
            name: torch.zeros_like(parameter) if gradient is None else gradient for (name, parameter), gradient in found
        }

    def gradients_of(self, loss: Tensor, tensors: list[Any]) -> tuple[Tensor | None, ...]:
        """Differentiate a loss of this network.

        Raises:
            BatchNormError: If it carries no gradient, or the backward pass cannot be made apart from the training's.
        """
        if not loss.requires_grad:
            raise BatchNormError(
                "the loss carries no gradient: expected it to depend on a parameter that requires one; it is a plain "
                "number, detached, made under torch.no_grad(), or every parameter is frozen."
            )
        try:
            # Not backward(): DDP and optimizers that step in the backward pass listen to that.
            return torch.autograd.grad(loss, tensors, allow_unused=True)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            raise BatchNormError(
                f"the backward pass failed with {first_line(error)}: checkpoint(..., use_reentrant=True) allows none "
                "but the training's own. Use use_reentrant=False."
            ) from error

    @contextmanager
    def moved(self, direction: Gradient, distance: float) -> Iterator[None]:
        """Subtract ``distance`` times a direction from the parameters, for as long as the context lasts.

        The parameters get other storage meanwhile, so that they come back bit for bit.
        """
        with ExitStack() as stack:
            for name, step in direction.items():
                parameter = self.parameters[name]
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = parameter.data.sub(step.to(parameter.dtype), alpha=distance)
            yield


@contextmanager
def objective_of(model: nn.Module, loss: Loss | None, batch: Any, step: Step | None) -> Iterator[Objective]:
    """Borrow a model, and lend out the loss of one batch in training mode; running statistics stand still.

    Modes are as they are if the model is in training mode; else everything trains but `FrozenBatchNorm`.

    Args:
        model: The network; wrappers (DDP, ``torch.compile``) are looked through, and each process has its own batch.
        loss: A function ``(output, target) -> scalar`` for a batch that is a pair.
        batch: One, moved to the model's device.
        step: In place of ``loss``: a function ``(model, batch) -> scalar`` for any other batch.

    Raises:
        BatchNormError: If there is neither ``loss`` nor ``step`` or both, or the batch has no target.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 3.0)
        >>> pair = torch.ones(1, 1), torch.zeros(1, 1)
        >>> with objective_of(layer, nn.functional.mse_loss, pair, None) as objective:
        ...     objective.gradient()
        (9.0, {'weight': tensor([[6.]])})
    """
    run = Run(loss, step, cure="step=lambda model, batch: …, which returns the batch's loss")
    if not run.reads_losses:
        raise BatchNormError(
            "a probe needs a loss: give loss=, a function (output, target) -> scalar, or step=, a function "
            "(model, batch) -> scalar."
        )
    with _borrowed(model, batch, run) as objective:
        yield objective


@contextmanager
def forward_of(model: nn.Module, batch: Any, step: Step | None = None) -> Iterator[Objective]:
    """Borrow a model as `objective_of` does, for what needs forward passes and no loss.

    Args:
        model: The network.
        batch: A tensor, or a tuple or list whose first element is the input.
        step: A function ``(model, batch)`` that runs the network on any other batch; what it returns does not matter.
    """
    run = Run(forward=step, cure="step=lambda model, batch: model(...)")
    with _borrowed(model, batch, run) as objective:
        yield objective


@contextmanager
def _borrowed(model: nn.Module, batch: Any, run: Run) -> Iterator[Objective]:
    network = unwrap(model)
    with ExitStack() as stack:
        stack.enter_context(preserved(network))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(eagerly())
        if not network.training:
            for module in network.modules():
                module.training = not isinstance(module, FrozenBatchNorm)  # not .train(): it may rebuild the module
        if named_batch_norms(network):
            stack.enter_context(paused_statistics(network))
        yield Objective(network, run, batch)


def norm_of(gradient: Gradient) -> float:
    """Return the Euclidean norm over all parameters.

    Example:
        >>> norm_of({"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])})
        5.0
    """
    norms = [torch.linalg.vector_norm(each, dtype=accumulation_dtype(each.device)).item() for each in gradient.values()]
    return math.hypot(*norms)
