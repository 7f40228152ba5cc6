"""What recalibrating one layer alone would do to the loss, for all layers from one backward pass."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import first_line

__all__ = ["Attribution", "InputShift", "no_gradients_because"]


@dataclass(frozen=True, slots=True)
class InputShift:
    """The change of a layer's input that does what other running statistics would do.

    With x' = x + s·(x − μ_run) + t, evaluation gives γ·(x' − μ_run)/√(σ²_run + ε) + β, which is
    γ·(x − μ_pop)/√(σ²_pop + ε) + β for s = √((σ²_run + ε)/(σ²_pop + ε)) − 1 and t = (μ_run − μ_pop)·(1 + s).

    Attributes:
        scale: s of each channel, (C,).
        shift: t of each channel, (C,), activation units.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def towards(cls, layer: _BatchNorm, mean: Tensor, var: Tensor) -> "InputShift | None":
        """Give that from the running statistics to others; ``None`` if there are none or they are not finite.

        Example:
            >>> InputShift.towards(nn.BatchNorm1d(1), torch.ones(1), torch.ones(1)).shift
            tensor([-1.])
        """
        if layer.running_mean is None or layer.running_var is None:
            return None
        own_mean, own_var = layer.running_mean.to(mean), layer.running_var.to(mean)
        factor = ((own_var + layer.eps) / (var + layer.eps)).sqrt()
        found = cls(factor - 1, (own_mean - mean) * factor)
        finite = bool(torch.isfinite(found.scale).all()) and bool(torch.isfinite(found.shift).all())
        return found if finite else None


class Attribution:
    """Adds up the gradients of the mean loss with respect to s and t at 0, batch by batch.

    It needs neither affine parameters nor that they take gradients, and counts all calls of a layer.

    Args:
        shifts: By layer.
        problem: What is known to prevent it, or ``None``.

    Attributes:
        problem: What prevents it, or ``None``.

    Reference:
        The first-order change of the loss under the affine change that other running statistics are; of γ and β it is
        ∂L/∂γ·(γ' − γ) + ∂L/∂β·(β' − β).
    """

    def __init__(self, shifts: Mapping[str, InputShift], problem: str | None = None) -> None:
        self.shifts = shifts
        self.problem = problem
        self._sums: dict[str, Tensor] = {}
        self._leaves: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def changes(self) -> dict[str, float]:
        """By layer that a gradient reaches, the predicted change of the loss, summed over examples."""
        return {name: float(total) for name, total in self._sums.items()}

    @contextmanager
    def at(self, layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
        """Put s = 0 and t = 0 into the layers' inputs, which changes none of their values."""
        with ExitStack() as stack:
            for name, shift in self.shifts.items():
                like = layers[name].running_mean
                assert like is not None
                zeros = torch.zeros_like(shift.scale, dtype=like.dtype, device=like.device)
                leaves = zeros.clone().requires_grad_(), zeros.clone().requires_grad_()
                self._leaves[name] = leaves
                stack.enter_context(_shifted_input(layers[name], *leaves))
            yield

    def add(self, loss: Tensor, examples: int) -> None:
        """Take in one batch's gradients, ``examples`` of which its mean loss is; what prevents it becomes `problem`."""
        leaves = list(chain.from_iterable(self._leaves.values()))
        if self.problem is None and not loss.requires_grad:
            self.problem = "the loss carries no gradient: it is a plain number, detached, or made under torch.no_grad()"
        if self.problem is not None or not leaves:
            return
        try:
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.problem = f"the backward pass failed with {first_line(error)}"
            return
        for name, by_scale, by_shift in zip(self._leaves, gradients[::2], gradients[1::2], strict=True):
            if by_scale is None or by_shift is None:
                continue
            shift = self.shifts[name]
            change = (by_scale.to(shift.scale) * shift.scale).sum() + (by_shift.to(shift.scale) * shift.shift).sum()
            before = self._sums.get(name)
            self._sums[name] = change * examples if before is None else before + change * examples


def no_gradients_because(network: nn.Module) -> str | None:
    """Say why a network cannot be run with gradients, if so.

    Example:
        >>> with torch.inference_mode():
        ...     layer = nn.Linear(1, 1)
        >>> no_gradients_because(layer)
        "'weight' was made in torch.inference_mode(), and takes part in no backward pass: make the model outside of it"
    """
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        if tensor.is_inference():
            return (
                f"{name!r} was made in torch.inference_mode(), and takes part in no backward pass: make the model "
                "outside of it"
            )
    return None


@contextmanager
def _shifted_input(layer: _BatchNorm, scale: Tensor, shift: Tensor) -> Iterator[None]:
    """Have a layer take x + s·(x − running_mean) + t for its input x."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or x.dim() < 2 or not torch.is_grad_enabled():
            return None
        view = (1, -1, *[1] * (x.dim() - 2))
        assert layer.running_mean is not None
        s, t, mean = (each.to(x.dtype).view(view) for each in (scale, shift, layer.running_mean))
        changed = x + s * (x - mean) + t
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "input": changed})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
