"""Variants that behave differently as batches are counted, given statistics whose count is missing."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bn_lightning.layers.base import BatchNormVariant

__all__ = ["StepDependent"]


class StepDependent(BatchNormVariant):
    """Base of variants whose training depends on ``num_batches_tracked``, until that reaches `converged_count`.

    Running statistics that are not fresh (mean 0 and variance 1) without a count, or with a count of 0, came from
    somewhere else: an older file, another framework, a recalibration. The layer takes them for converged, and sets its
    count to `converged_count`; taken for the beginning of training they would be thrown away or distrusted.
    """

    def converged_count(self) -> int:
        """Return the count from which on further counting makes no difference."""
        raise NotImplementedError

    def adopt_statistics(self) -> str | None:
        """Take statistics without a count for converged; return what was changed for that."""
        count, end = self.num_batches_tracked, self.converged_count()
        if count is None or count.is_meta or int(count) or not end:
            return None
        if not _are_measured({"running_mean": self.running_mean, "running_var": self.running_var}):
            return None
        count.fill_(end)
        return f"num_batches_tracked 0 → {end}: its running statistics are not fresh, and count as converged"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key, end = prefix + "num_batches_tracked", self.converged_count()
        count = state_dict.get(key)
        uncounted = count is None or (not count.is_meta and not int(count))
        converged = bool(end) and uncounted and _are_measured(state_dict, prefix)
        if converged and count is not None:
            # A tensor of our own: `assign=True` makes the file's the layer's.
            state_dict[key] = count.new_full(count.shape, end)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if converged and count is None and self.num_batches_tracked is not None:
            self.num_batches_tracked.fill_(end)


def _are_measured(state: Mapping[str, Tensor | None], prefix: str = "") -> bool:
    """Whether running statistics are there and not as a new layer has them."""
    fresh = {"running_mean": 0, "running_var": 1}
    tensors = {name: state.get(prefix + name) for name in fresh}
    return any(
        tensor is not None and not tensor.is_meta and bool((tensor != fresh[name]).any())
        for name, tensor in tensors.items()
    )
