"""The limits of Batch Renormalization's correction, and how they widen in the course of training."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bn_lightning.errors import ConversionError
from bn_lightning.functional.normalize import batch_normalize, channel_statistics
from bn_lightning.functional.renorm import ramp, renorm_correction
from bn_lightning.layers.step_dependent import StepDependent

__all__ = ["RenormSchedule"]


class RenormSchedule(StepDependent):
    """Base of the variants with Batch Renormalization's r_max and d_max; `set_limits` in their `configure`.

    The schedule hangs on ``num_batches_tracked`` alone, so that training resumes where it was.

    Reference:
        Ioffe, arXiv:1702.03275, §4: r_max from 1 to 3 over steps 5,000–40,000 and d_max from 0 to 5 over 5,000–25,000.
    """

    r_max: float
    d_max: float
    r_warmup: tuple[int, int] | None
    d_warmup: tuple[int, int] | None

    def set_limits(
        self, r_max: float, d_max: float, r_warmup: Sequence[int] | None, d_warmup: Sequence[int] | None
    ) -> None:
        """Set the schedule.

        Raises:
            ConversionError: If a value makes no sense.
        """
        for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            if not (isinstance(value, int | float) and least <= value < math.inf):
                raise ConversionError(
                    f"{name} has to be a number from {least} up, got {value!r}; a large one, such as 1e6, is no limit."
                )
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.r_warmup, self.d_warmup = _period("r_warmup", r_warmup), _period("d_warmup", d_warmup)

    def require_running_statistics(self) -> None:
        """Refuse to be without them.

        Raises:
            ConversionError: If the layer has none to correct towards.
        """
        if self.running_mean is None:
            raise ConversionError(
                f"{type(self).__name__}({self.num_features}) corrects batch statistics towards running ones, and has "
                "none (track_running_stats=False). Give it running statistics or exclude the layer."
            )

    def current_limits(self) -> tuple[Tensor, Tensor]:
        """Return r_max and d_max at this step, as tensors where the layer is."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        step = self.num_batches_tracked.to(torch.promote_types(self.running_mean.dtype, torch.float32))
        return ramp(step, 1.0, self.r_max, self.r_warmup), ramp(step, 0.0, self.d_max, self.d_warmup)

    def normalize_corrected(self, x: Tensor) -> Tensor:
        """Normalize by this batch's statistics; r and d go into scale and shift, so they cost nothing."""
        mean, var = channel_statistics(x.detach())
        scale, shift = self.corrected_affine(mean, var)
        count = x.numel() // self.num_features
        self.update_running_statistics(mean, var * (count / (count - 1)))
        return batch_normalize(x, mean, var, scale, shift, self.eps)

    def corrected_affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and shift that take x̂ to ``(x̂ · r + d) · weight + bias``, for a batch's statistics."""
        assert self.running_mean is not None
        assert self.running_var is not None
        r, d = renorm_correction(mean, var, self.running_mean, self.running_var, self.eps, *self.current_limits())
        if self.weight is None:
            return r, d if self.bias is None else self.bias + d
        shift = self.weight * d if self.bias is None else torch.addcmul(self.bias, self.weight, d)
        return self.weight * r, shift

    def converged_count(self) -> int:
        """Return the end of the schedule."""
        return max(period[1] if period else 0 for period in (self.r_warmup, self.d_warmup))


def _period(name: str, period: Sequence[int] | None) -> tuple[int, int] | None:
    """Check a period as code or a YAML file gives it."""
    if period is None:
        return None
    if (
        isinstance(period, str)
        or not isinstance(period, Sequence)
        or len(period) != 2
        or not all(isinstance(step, int) for step in period)
        or not 0 <= period[0] <= period[1]
    ):
        raise ConversionError(
            f"{name} is the first and the last step of a period, such as (5_000, 40_000), or None for the limit at "
            f"once; got {period!r}."
        )
    return period[0], period[1]
