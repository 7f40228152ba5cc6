"""Cross-replica Batch Normalization: one batch, spread over several processes."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.cross_replica import replica_normalize, replica_statistics
from bn_lightning.functional.normalize import batch_norm_with_statistics
from bn_lightning.internals import assert_async, never_compiled
from bn_lightning.layers.base import require_flag
from bn_lightning.layers.renorm_schedule import RenormSchedule

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

__all__ = ["CrossReplicaBatchNorm"]


class CrossReplicaBatchNorm(RenormSchedule):
    """Normalize by the statistics of all processes' batches together, on any device; evaluate as plain BatchNorm.

    Like ``torch.nn.SyncBatchNorm``, but also for gloo on CPUs. In training one collective goes forward and one
    backward, so every process has to take both ways; where an input needs no gradient the second is spared. Batches may
    differ in size, and a process may have none (N = 0): it gets the same running statistics and takes part in the
    backward pass. Gradients of scale and shift are the process's own sums, because DDP averages them.
    Without ``torch.distributed``, or in a group of one, the layer is plain BatchNorm (plain `BatchRenorm`).

    A process may hold a single value per channel; only all processes together may not. That is an error in all of them,
    on a GPU one that its device raises on its own time, since the host does not wait for the count.

    ``torch.compile(fullgraph=True)`` takes it in one process; with several the graph breaks here, as it does at torch's
    own. Copies share the process group; a layer with one cannot be pickled, one with ``None`` can.

    Args:
        process_group: Whose batches belong together; ``None`` for all processes.
        renorm: Correct the common statistics towards the running ones, as `BatchRenorm` does.
        r_max: For ``renorm``, as in `BatchRenorm`.
        d_max: Likewise.
        r_warmup: Likewise.
        d_warmup: Likewise.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *).

    Raises:
        BatchNormError: In the forward pass, for one value per channel in all processes together.

    Example:
        >>> import torch
        >>> x = torch.randn(8, 3, 5, 5)
        >>> torch.equal(CrossReplicaBatchNorm(3)(x), torch.nn.BatchNorm2d(3)(x))  # one process
        True

    Reference:
        Ioffe & Szegedy, arXiv:1502.03167, Alg. 1, over the examples of all processes; Ioffe, arXiv:1702.03275, for
        ``renorm``.
    """

    process_group: "ProcessGroup | None"
    renorm: bool

    def configure(
        self,
        process_group: "ProcessGroup | None" = None,
        renorm: bool = False,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_warmup: Sequence[int] | None = (5_000, 40_000),
        d_warmup: Sequence[int] | None = (5_000, 25_000),
    ) -> None:
        """Set whose batches belong together, and whether and how far to correct towards running statistics.

        Raises:
            ConversionError: If a limit makes no sense, or for ``renorm`` without running statistics.
        """
        self.process_group = process_group
        require_flag("renorm", renorm)
        self.renorm = renorm
        self.set_limits(r_max, d_max, r_warmup, d_warmup)
        if renorm:
            self.require_running_statistics()

    @property
    def has_others_values(self) -> bool:
        """Whether there are other processes."""
        return self._replicas() is not None

    def check_batch(self, x: Tensor) -> None:
        """Refuse one value per channel where it is all there is; among several processes the statistics tell."""
        if self._replicas() is None:
            super().check_batch(x)

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize by the statistics of all processes that belong together."""
        group = self._replicas()
        if group is not None:
            return self._normalize_together(x, group)
        if self.renorm:
            return self.normalize_corrected(x)
        # Not `plain_step`: paused, torch's kernel saves fewer tensors, which activation checkpointing refuses.
        y, mean, var = batch_norm_with_statistics(x, self.weight, self.bias, self.eps)
        self.update_running_statistics(mean, var)
        return y

    def converged_count(self) -> int:
        """Return the end of the schedule, if there is one."""
        return super().converged_count() if self.renorm else 0

    @never_compiled  # in a graph, what leads to no gradient of this process's would be left out, its collective too
    def _normalize_together(self, x: Tensor, group: "ProcessGroup") -> Tensor:
        count, mean, var = replica_statistics(x, group)
        # All processes have the same count, so all of them stop. On a CPU reading it costs nothing.
        if count.device.type != "cpu":
            assert_async(count > 1, "CrossReplicaBatchNorm: one value per channel in all processes together")
        elif int(count) < 2:
            raise BatchNormError(
                f"{self.label} needs more than one value per channel to take batch "
                f"statistics of, and {distributed.get_world_size(group)} processes have {int(count)} together (here "
                f"shape {tuple(x.shape)}). Use a larger batch, drop the last one of an epoch (drop_last=True), or "
                "evaluation mode."
            )
        scale, shift = self.corrected_affine(mean, var) if self.renorm else (self.weight, self.bias)
        self.update_running_statistics(mean, var * (count / (count - 1)))
        return replica_normalize(x, count, mean, var, scale, shift, self.eps, group)

    def _replicas(self) -> "ProcessGroup | None":
        """Return the processes to exchange statistics with; ``None`` if there is no other."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        group = distributed.group.WORLD if self.process_group is None else self.process_group
        return group if distributed.get_world_size(group) > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CrossReplicaBatchNorm":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # A process group cannot be copied, and averaged copies of a network belong to the same one.
        memo[id(self.process_group)] = self.process_group
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
