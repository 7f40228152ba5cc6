"""Make the processes of a distributed training agree on running statistics."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.cross_replica import gathered, pool_variances
from bn_lightning.functional.gap import channel_gap, layer_gap
from bn_lightning.functional.moments import accumulation_dtype
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.merge_result import MergedLayer, MergeResult, write
from bn_lightning.preservation import out_of_inference_mode
from bn_lightning.selection import require_batch_norms, unwrap

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

__all__ = ["merge_statistics"]

_Layout = list[tuple[str, int | None]]


@dataclass(frozen=True, slots=True)
class _Statistics:
    """The running statistics of one layer, or of one domain of it; ``None`` where it has none."""

    name: str
    layer: _BatchNorm
    mean: Tensor | None
    var: Tensor | None
    count: Tensor | None

    def row(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return what the other processes need to know: whether it is measured, count, mean and variance."""
        if self.mean is None or self.var is None:
            return torch.empty(0, device=device, dtype=dtype)
        count = self.mean.new_zeros(()) if self.count is None else self.count
        # As in a new layer: nothing was measured yet, and nothing loaded or recalibrated.
        fresh = (count == 0) & (self.mean == 0).all() & (self.var == 1).all()
        parts = (~fresh, count, self.mean, self.var)
        return torch.cat([part.detach().to(device, dtype).reshape(-1) for part in parts])


def merge_statistics(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    process_group: "ProcessGroup | None" = None,
) -> MergeResult:
    """Merge the running statistics that several processes took of their own share of the data, in place.

    Under DDP every process evaluates with, and process 0 saves, statistics of its own batches. With μ_r and σ²_r in
    process r they become mean = average of μ_r and variance = average of σ²_r + (μ_r − mean)², the law of total
    variance, computed in float64: every process weighs alike, whatever it has counted. ``num_batches_tracked`` becomes
    the largest. A process whose layer is as new does not count. Afterwards all processes have the same bits.

    Every process has to call this. The layers' names go round first, then all layers' statistics in one collective.

    Args:
        model: The network, the same in every process; DDP and ``torch.compile`` wrappers are looked through.
        include: Name patterns (``fnmatch``) of the BN layers to merge; empty means all.
        exclude: Name patterns of the BN layers to leave out.
        process_group: The processes; ``None`` for all.

    Returns:
        One row a layer, with the reason where it was left as it was, which without other processes is every one;
        ``.undo()`` puts this process's statistics back.

    Raises:
        BatchNormError: If the model has no BN layer, a pattern matches none, the processes' layers differ, or
            statistics are not finite; in all processes, whichever is at fault, and then nothing was written.

    Example:
        >>> merge_statistics(nn.BatchNorm1d(2)).rows[0].reason
        'there is no other process'
    """
    processes = _count_processes(process_group)
    problem, statistics = None, []
    try:
        statistics = _selected(model, include, exclude)
    except BatchNormError as error:
        if processes == 1:
            raise
        problem = str(error)
    if processes == 1:
        rows = [
            MergedLayer(each.name, int(each.mean is not None), None, _reason(each) or "there is no other process")
            for each in statistics
        ]
        return MergeResult(tuple(rows), 1)
    _require_agreement(problem, statistics, process_group)
    with out_of_inference_mode():
        rows, planned = _merged(statistics, process_group)
        before = tuple((buffer, buffer.clone()) for buffer, _ in planned)
        result = MergeResult(tuple(rows), processes, before)
        write(planned)
    return result


def _count_processes(group: "ProcessGroup | None") -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return max(distributed.get_world_size(group), 1)  # -1 outside the group


def _selected(model: nn.Module, include: Iterable[str], exclude: Iterable[str]) -> list[_Statistics]:
    found = []
    for name, layer in require_batch_norms(unwrap(model), include, exclude).items():
        own = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        found.append(_Statistics(name, layer, *own))
        if isinstance(layer, DomainBatchNorm):
            for domain in range(1, layer.num_domains):
                found.append(_Statistics(f"{name} (domain {domain})".strip(), layer, *layer.tensors(domain)[:3]))
    return found


def _reason(statistics: _Statistics) -> str | None:
    return None if statistics.mean is not None else "it has no running statistics (track_running_stats=False)"


def _require_agreement(problem: str | None, statistics: list[_Statistics], group: "ProcessGroup | None") -> None:
    """Raise in all processes if one has a problem or other layers: a collective of unequal lengths would hang."""
    layout: _Layout = [(each.name, None if each.mean is None else each.mean.numel()) for each in statistics]
    everyone: list[tuple[str | None, _Layout]] = [(None, [])] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, (problem, layout), group=group)
    for rank, (theirs, _) in enumerate(everyone):
        if theirs is not None:
            raise BatchNormError(f"process {rank} cannot merge its running statistics: {theirs}")
    first = everyone[0][1]
    for rank, (_, other) in enumerate(everyone):
        if other != first:
            raise BatchNormError(
                f"the processes' BatchNorm layers differ, so their statistics cannot be merged: process 0 has "
                f"{_difference(first, other)}, process {rank} has {_difference(other, first)}. Build the same model "
                "in every process, or pick what they share with include= and exclude=."
            )


def _difference(one: _Layout, other: _Layout) -> str:
    """Name the first entry that the other does not have in its place."""
    for index, (name, channels) in enumerate(one):
        if other[index : index + 1] != [(name, channels)]:
            width = "no running statistics" if channels is None else f"{channels} channels"
            return f"{name or '(root)'!r} ({width})"
    return f"no more than {len(one)} layers"


def _merged(
    statistics: list[_Statistics], group: "ProcessGroup | None"
) -> tuple[list[MergedLayer], list[tuple[Tensor, Tensor]]]:
    """Return the rows, and what is to be written into which buffer."""
    device = next((each.mean.device for each in statistics if each.mean is not None), torch.device("cpu"))
    parts = [each.row(device, accumulation_dtype(device)) for each in statistics]
    own = torch.cat(parts)
    # On the host from here on: many small operations, the same in every process.
    table = (gathered(own, group) if len(own) else own[None]).cpu()
    rows, planned = [], []
    for each, values in zip(statistics, table.split([len(part) for part in parts], dim=1), strict=True):
        if each.mean is None or each.var is None:
            rows.append(MergedLayer(each.name, 0, None, _reason(each)))
            continue
        measured, counts, moments = values[:, :1], values[:, 1], values[:, 2:]
        means, variances = moments.chunk(2, dim=1)
        number = int(measured.sum())
        if not number:
            rows.append(MergedLayer(each.name, 0, None, "no process has taken statistics yet"))
            continue
        # About one process's, so that equal statistics come out as they went in.
        shift = values[measured[:, 0].argmax(), 2:].chunk(2)
        _, mean, var = pool_variances(measured, means - shift[0], variances - shift[1])
        mean, var = mean + shift[0], var + shift[1]
        cast = mean.to(each.mean.dtype), var.to(each.var.dtype)
        _require_finite(each.name, moments, cast)
        weight = None if each.layer.weight is None else each.layer.weight.detach().cpu()
        channels = channel_gap(means, variances, mean, var, each.layer.eps)
        gaps = [float(layer_gap(channels[rank], weight)) for rank in measured[:, 0].nonzero().flatten().tolist()]
        rows.append(MergedLayer(each.name, number, max(gaps), None))
        planned += [(each.mean, cast[0]), (each.var, cast[1])]
        if each.count is not None:
            planned.append((each.count, counts.max().to(each.count.dtype)))
    return rows, planned


def _require_finite(name: str, moments: Tensor, merged: tuple[Tensor, Tensor]) -> None:
    bad = (~torch.isfinite(moments)).any(1).nonzero().flatten().tolist()
    if bad or not all(bool(torch.isfinite(value).all()) for value in merged):
        where = f"in process {bad[0]}" if bad else f"once merged, as {merged[0].dtype}"
        raise BatchNormError(
            f"the running statistics of {name or '(root)'!r} are not finite {where}, and would be so in all processes. "
            "Nothing was written. Look for the first layer with non-finite activations "
            "(bn_lightning.observe_activations), or leave it out with exclude=."
        )
