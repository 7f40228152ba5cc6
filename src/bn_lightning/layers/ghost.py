"""Ghost Batch Normalization: the statistics of small batches, in a large one."""

import torch
from torch import Tensor

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.functional.normalize import batch_norm_with_statistics
from bn_lightning.layers.base import BatchNormVariant

__all__ = ["GhostBatchNorm"]


class GhostBatchNorm(BatchNormVariant):
    """Normalize each group of ``virtual_batch_size`` examples by its own statistics; evaluate as plain BatchNorm.

    With k = N / virtual_batch_size groups, group g holds the examples g, g + k, g + 2k, … (of channels_last input,
    neighbours): which examples meet makes no difference in shuffled data, and this needs no copy. What is left over
    forms a smaller group, or joins the one before where it would have a single value per channel. The running
    statistics move once a step, towards the groups' means and variances averaged by group size; Hoffer et al. move
    them once a group.

    Args:
        virtual_batch_size: Examples a group. A batch that is no larger is normalized as plain BatchNorm does.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *).

    Example:
        >>> layer = GhostBatchNorm(3, virtual_batch_size=4)
        >>> layer(torch.randn(8, 3, 5, 5)).shape
        torch.Size([8, 3, 5, 5])

    Reference:
        Hoffer, Hubara & Soudry, arXiv:1705.08741, Alg. 1.
    """

    virtual_batch_size: int

    def configure(self, virtual_batch_size: int = 32) -> None:
        """Set the group size.

        Raises:
            ConversionError: If it is not a positive integer.
        """
        if not isinstance(virtual_batch_size, int) or isinstance(virtual_batch_size, bool) or virtual_batch_size < 1:
            raise ConversionError(
                f"virtual_batch_size counts the examples of a group, got {virtual_batch_size!r}; 32 is usual."
            )
        self.virtual_batch_size = virtual_batch_size

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize the whole groups in one call, and what is left over in another."""
        whole = self._in_whole_groups(x)
        # Whole, or split: the gradient of a slice is as large as x, and zero elsewhere.
        parts = x.split([whole, x.shape[0] - whole]) if 0 < whole < x.shape[0] else (x,)
        results = [self._normalize_groups(part, max(1, part.shape[0] // self.virtual_batch_size)) for part in parts]
        if len(results) == 1:
            y, statistics = results[0]
        else:
            y = torch.cat([y for y, _ in results])
            shares = [part.shape[0] / x.shape[0] for part in parts]
            statistics = torch.stack([own * share for (_, own), share in zip(results, shares, strict=True)]).sum(0)
        self.update_running_statistics(*statistics.unbind())
        return y

    def _in_whole_groups(self, x: Tensor) -> int:
        """Count the examples that are normalized in groups of equal size."""
        examples = x.shape[0]
        values = x.numel() // (examples * self.num_features)  # of one channel in one example
        size = min(self.virtual_batch_size, examples)
        if size * values == 1:
            raise BatchNormError(
                f"{self.label} would normalize groups with one value per channel in a batch of shape "
                f"{tuple(x.shape)}. Use at least 2 for virtual_batch_size, which is {self.virtual_batch_size}."
            )
        rest = examples % size
        # A single value has no variance: its group joins the one before.
        return examples - rest - (size if rest * values == 1 else 0)

    def _normalize_groups(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Normalize groups of equal size; return also their average mean and variance (correction=1), (2, C)."""
        if x.is_contiguous():
            # Free of copies: (v·k, C, *) is (v, k·C, *) in memory.
            grouped = x.view(x.shape[0] // groups, groups * self.num_features, *x.shape[2:])
            weight, bias = (None if p is None else p.expand(groups, -1).reshape(-1) for p in (self.weight, self.bias))
            y, mean, var = batch_norm_with_statistics(grouped, weight, bias, self.eps)
            return y.view(x.shape), torch.stack([mean, var]).view(2, groups, -1).sum(1).mul_(1 / groups)
        results = [
            batch_norm_with_statistics(chunk, self.weight, self.bias, self.eps)
            for chunk in x.split(x.shape[0] // groups)
        ]
        statistics = torch.stack([torch.stack([mean, var]) for _, mean, var in results])
        return torch.cat([y for y, _, _ in results]), statistics.mean(0)
