"""Whether batches come as a random draw, which a standard error takes for granted."""

from typing import Any

from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from bn_lightning.errors import RecalibrationError

__all__ = ["AUTO", "TOLERANCE", "checked_tolerance", "draws_at_random", "tolerance_for"]

#: Stop at `TOLERANCE` where `draws_at_random`, else not at all.
AUTO = "auto"
TOLERANCE = 0.01
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def draws_at_random(batches: Any) -> bool:
    """Tell whether batches are known to be a random draw: a ``DataLoader`` that shuffles.

    Of a list, a generator or a sampler of one's own nothing is known: class after class, or one hour after the other,
    the first twenty batches may be all alike and unlike the rest.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> draws_at_random(DataLoader(range(8), shuffle=True)), draws_at_random(DataLoader(range(8)))
        (True, False)
    """
    batch_sampler = getattr(batches, "batch_sampler", None)
    if batch_sampler is not None and type(batch_sampler) is not BatchSampler:
        return False
    sampler = getattr(batches, "sampler", None)
    return isinstance(sampler, _RANDOM) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)


def tolerance_for(batches: Any, tolerance: Any) -> Any:
    """Return the tolerance to stop at: ``"auto"`` is 1 % of σ for a random draw, and else none."""
    if isinstance(tolerance, str) and tolerance == AUTO:
        return TOLERANCE if draws_at_random(batches) else None
    return tolerance


def checked_tolerance(tolerance: float | None) -> float:
    """Return a tolerance in σ, 0 for ``None``.

    Raises:
        RecalibrationError: If it is none.
    """
    if tolerance is None:
        return 0.0
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise RecalibrationError(
            f"tolerance is a standard error in σ, such as 0.01, or None to take all batches, or 'auto'; got "
            f"{tolerance!r}."
        )
    return float(tolerance)
