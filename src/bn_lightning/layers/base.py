"""What every BatchNorm variant is: torch's BN for (N, C, *), with options, under the same state_dict keys."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError, ConversionError, nearest
from bn_lightning.functional.training_step import batch_norm_step

__all__ = ["BatchNormVariant", "require_flag", "require_options", "unlike_population"]


def require_flag(name: str, value: object) -> None:
    """Refuse an option that is neither ``True`` nor ``False``.

    Raises:
        ConversionError: If so.
    """
    if not isinstance(value, bool):
        raise ConversionError(f"{name} is True or False, got {value!r}.")


def require_options(owner: str, options: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return options if their owner knows them all.

    Raises:
        ConversionError: If not, with the nearest one there is and all of them.
    """
    known = list(known)
    for option in options:
        if option not in known:
            own = inspect.signature(_BatchNorm.__init__).parameters
            hint = " (each layer keeps its own)" if option in own else nearest(option, known)
            hint = " (pass them as they are: virtual_batch_size=16)" if option == "options" else hint
            has = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConversionError(f"{owner} has no option {option!r}{hint}; {has}.")
    return options


def unlike_population(layer: nn.Module) -> str | None:
    """Say why a layer's running statistics are not to be mean and variance of all it is given; ``None`` if they are.

    Example:
        >>> unlike_population(nn.BatchNorm1d(2)) is None
        True
    """
    return layer.unlike_population() if isinstance(layer, BatchNormVariant) else None


class BatchNormVariant(_BatchNorm):
    """Base of the variants: in evaluation plain BatchNorm, in training what `normalize_batch` says.

    Parameters and buffers are exactly torch's, so checkpoints load both ways. A variant's own settings are the keyword
    arguments of its `configure`, kept in attributes of the same names; a layer that is there already becomes a variant
    by taking its class and being configured, which `convert_batch_norm` does.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics; ``None`` averages all batches alike.
        affine: ``True`` for scale and shift, ``"scale"``, ``"shift"``, or ``False`` for neither.
        track_running_stats: As in torch: without it evaluation uses batch statistics too.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        bias: torch's own keyword: ``affine=True, bias=False`` is ``affine="scale"``.
        **options: The variant's settings, as its `configure` takes them.

    Shape:
        (N, C, *), any number of further axes; the output has the same shape, dtype and memory format.

    Raises:
        ConversionError: If an option is unknown or its value makes no sense.
    """

    #: The plain class a converted layer had; ``None`` for one that was built as what it is.
    converted_from: type[_BatchNorm] | None = None
    #: The name it was converted under, for messages; a layer does not know where it is.
    known_as: str | None = None
    #: Which conversion made it what it is.
    conversion: int | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool | str = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        if affine not in (True, False, "scale", "shift"):
            raise ConversionError(f"affine has to be True, False, 'scale' or 'shift', got {affine!r}.")
        # Parameters are made here: torch has `bias=` since 2.13 only, and no shift without scale.
        super().__init__(num_features, eps, momentum, False, track_running_stats, device, dtype)
        self.affine = affine is not False
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if affine in (True, "scale"):
            self.weight = nn.Parameter(torch.ones(num_features, **factory))
        if affine == "shift" or (affine is True and bias):
            self.bias = nn.Parameter(torch.zeros(num_features, **factory))
        self.configure(**require_options(type(self).__name__, options, self.option_names()))

    def configure(self) -> None:
        """Set the variant's options, checked; called by the constructor and by conversion."""

    def adopt_statistics(self) -> str | None:
        """Take over the statistics found on conversion; return what there is to say about it, if anything."""
        return None

    def unlike_population(self) -> str | None:
        """Say why the running statistics in use are not mean and variance of all the layer is given, if so."""
        return None

    def fixed_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
        """Return the mean, variance, weight and bias it normalizes by now; ``None`` if that depends on the batch.

        Folding and export go by them: the layer is then ``(x - mean) / sqrt(var + eps) * weight + bias``.
        """
        if self.training or self.running_mean is None or self.running_var is None:
            return None
        return self.running_mean, self.running_var, self.weight, self.bias

    @classmethod
    def option_names(cls) -> list[str]:
        """List the names of the variant's own settings."""
        return [name for name in inspect.signature(cls.configure).parameters if name != "self"]

    def options(self) -> dict[str, Any]:
        """Return the variant's settings as they are now."""
        return {name: getattr(self, name) for name in self.option_names()}

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize in training, and offer the batch's statistics to `update_running_statistics`."""
        raise NotImplementedError

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalize in evaluation: by running statistics or, as in torch, by the batch's where there are none."""
        own = self.running_mean is None
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, own, 0.0, self.eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *)."""
        self._check_input_dim(input)
        if not self.training:
            return self.evaluate(input)
        if not input.numel() and not self.has_others_values:
            return self.plain_step(input)
        self.check_batch(input)
        return self.normalize_batch(input)

    def plain_step(self, x: Tensor) -> Tensor:
        """Take a training step of plain BatchNorm; an empty batch is counted and moves nothing, as in torch."""
        moved = (self.running_mean, self.running_var, self.num_batches_tracked)
        moved = moved if self.updates_running_statistics else (None, None, None)
        return batch_norm_step(x, *moved, self.weight, self.bias, self.momentum, self.eps)

    @property
    def has_others_values(self) -> bool:
        """Whether an empty batch has statistics all the same, since other processes add to them."""
        return False

    @property
    def label(self) -> str:
        """What messages call the layer."""
        name = f"{type(self).__name__}({self.num_features})"
        return name if self.known_as is None else f"{self.known_as or '(root)'!r}, a {name},"

    @property
    def updates_running_statistics(self) -> bool:
        """Whether this forward pass moves them: in training, unless paused (``track_running_stats=False``)."""
        return self.training and self.track_running_stats and self.running_mean is not None

    def check_batch(self, x: Tensor) -> None:
        """Refuse a batch without variance.

        Raises:
            BatchNormError: If there is one value per channel only.
        """
        if x.numel() == x.shape[1]:
            raise BatchNormError(
                f"{self.label} needs more than one value per channel to take batch "
                f"statistics of, got shape {tuple(x.shape)}. Use a larger batch, drop the last one of an epoch "
                "(drop_last=True), or evaluation mode."
            )

    @torch.no_grad()
    def update_running_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards a batch's, if they are to move.

        Args:
            mean: (C,).
            var: (C,), with correction=1 as torch has it.
        """
        if not self.updates_running_statistics:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.step_momentum()
        # In place, never rebound: DDP, averaged copies and compiled graphs hold references.
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)

    def step_momentum(self) -> float | Tensor:
        """Return the new batch's weight at this step: a tensor where it depends on the step, lest the host wait."""
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        return self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()

    def reset_parameters(self) -> None:
        """Reset the running statistics, scale to 1 and shift to 0."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Show torch's settings and the variant's own."""
        kind = {(True, True): True, (True, False): "'scale'", (False, True): "'shift'", (False, False): False}
        shown = {
            "eps": self.eps,
            "momentum": self.momentum,
            "affine": kind[self.weight is not None, self.bias is not None],
            "track_running_stats": self.track_running_stats,
            **self.options(),
        }
        return f"{self.num_features}, " + ", ".join(f"{name}={value}" for name, value in shown.items())

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise BatchNormError(f"{self.label} takes (N, {self.num_features}, *), got shape {tuple(input.shape)}.")
