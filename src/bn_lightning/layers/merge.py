"""Make the processes of a distributed training agree on running statistics."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.cross_replica import gathered, pool_variances
from bn_lightning.functional.gap import channel_gap, layer_gap
from bn_lightning.functional.moments import accumulation_dtype
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.merge_result import MergedLayer, MergeResult, write
from bn_lightning.layers.processes import count_processes, require_agreement
from bn_lightning.preservation import out_of_inference_mode
from bn_lightning.selection import require_batch_norms, unwrap

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

__all__ = ["merge_statistics", "statistics_spread"]


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
    processes = count_processes(process_group)
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
    require_agreement(problem, _layout(statistics), process_group, task="merge its running statistics")
    with out_of_inference_mode():
        rows, planned = [], []
        for each in _pooled(statistics, process_group):
            rows.append(MergedLayer(each.own.name, each.processes, each.gap, each.reason))
            planned += each.planned()
        before = tuple((buffer, buffer.clone()) for buffer, _ in planned)
        result = MergeResult(tuple(rows), processes, before)
        write(planned)
    return result


def statistics_spread(
    layers: Mapping[str, _BatchNorm], *, process_group: "ProcessGroup | None" = None
) -> dict[str, float]:
    """Tell by layer how far one process's running statistics are from what `merge_statistics` would make of all.

    It is the farthest process's distance, in standard deviations of the layer's output, the same in every process; of a
    `DomainBatchNorm` the farthest domain's. Nothing is written. A layer without running statistics, as new in every
    process or with statistics that are not finite is left out. Every process has to call this.

    Args:
        layers: Name to layer, the same in every process.
        process_group: The processes; ``None`` for all. One process alone spreads by nothing.

    Raises:
        BatchNormError: If the processes' layers differ; in all of them.

    Example:
        >>> statistics_spread({"norm": nn.BatchNorm1d(2)})
        {}
    """
    if count_processes(process_group) == 1:
        return {}
    statistics, owners = [], []
    for name, layer in layers.items():
        of_layer = _of_layer(name, layer)
        statistics += of_layer
        owners += [name] * len(of_layer)
    require_agreement(None, _layout(statistics), process_group, task="compare its running statistics")
    spread: dict[str, float] = {}
    with out_of_inference_mode():
        for name, each in zip(owners, _pooled(statistics, process_group), strict=True):
            if each.gap is not None and math.isfinite(each.gap):
                spread[name] = max(each.gap, spread.get(name, 0.0))
    return spread


@dataclass(frozen=True, slots=True)
class _Pooled:
    """What all processes' statistics of one layer are together, on the host; ``None`` with the reason."""

    own: _Statistics
    processes: int = 0
    gap: float | None = None
    reason: str | None = None
    moments: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    count: Tensor | None = None

    def planned(self) -> list[tuple[Tensor, Tensor]]:
        """Return what is to be written into which buffer."""
        own = self.own
        if self.mean is None or self.var is None or own.mean is None or own.var is None:
            return []
        assert self.moments is not None
        cast = self.mean.to(own.mean.dtype), self.var.to(own.var.dtype)
        _require_finite(own.name, self.moments, cast)
        planned = [(own.mean, cast[0]), (own.var, cast[1])]
        if own.count is not None and self.count is not None:
            planned.append((own.count, self.count.to(own.count.dtype)))
        return planned


def _selected(model: nn.Module, include: Iterable[str], exclude: Iterable[str]) -> list[_Statistics]:
    layers = require_batch_norms(unwrap(model), include, exclude)
    return [each for name, layer in layers.items() for each in _of_layer(name, layer)]


def _of_layer(name: str, layer: _BatchNorm) -> list[_Statistics]:
    found = [_Statistics(name, layer, layer.running_mean, layer.running_var, layer.num_batches_tracked)]
    if isinstance(layer, DomainBatchNorm):
        for domain in range(1, layer.num_domains):
            found.append(_Statistics(f"{name} (domain {domain})".strip(), layer, *layer.tensors(domain)[:3]))
    return found


def _layout(statistics: list[_Statistics]) -> list[tuple[str, int | None]]:
    return [(each.name, None if each.mean is None else each.mean.numel()) for each in statistics]


def _reason(statistics: _Statistics) -> str | None:
    return None if statistics.mean is not None else "it has no running statistics (track_running_stats=False)"


def _pooled(statistics: list[_Statistics], group: "ProcessGroup | None") -> list[_Pooled]:
    """Gather every layer's statistics in one collective, and pool them."""
    device = next((each.mean.device for each in statistics if each.mean is not None), torch.device("cpu"))
    parts = [each.row(device, accumulation_dtype(device)) for each in statistics]
    own = torch.cat(parts) if parts else torch.empty(0)
    # On the host from here on: many small operations, the same in every process.
    table = (gathered(own, group) if len(own) else own[None]).cpu()
    rows = table.split([len(part) for part in parts], dim=1)
    return [_pool(each, values) for each, values in zip(statistics, rows, strict=True)]


def _pool(own: _Statistics, values: Tensor) -> _Pooled:
    """Pool one layer's statistics, a row a process."""
    if own.mean is None or own.var is None:
        return _Pooled(own, reason=_reason(own))
    measured, counts, moments = values[:, :1], values[:, 1], values[:, 2:]
    means, variances = moments.chunk(2, dim=1)
    number = int(measured.sum())
    if not number:
        return _Pooled(own, reason="no process has taken statistics yet")
    # About one process's, so that equal statistics come out as they went in.
    shift = values[measured[:, 0].argmax(), 2:].chunk(2)
    _, mean, var = pool_variances(measured, means - shift[0], variances - shift[1])
    mean, var = mean + shift[0], var + shift[1]
    weight = None if own.layer.weight is None else own.layer.weight.detach().cpu()
    channels = channel_gap(means, variances, mean, var, own.layer.eps)
    gaps = [float(layer_gap(channels[rank], weight)) for rank in measured[:, 0].nonzero().flatten().tolist()]
    # Not max(gaps), which passes a NaN by unless it comes first.
    return _Pooled(own, number, float(torch.tensor(gaps).double().max()), None, moments, mean, var, counts.max())


def _require_finite(name: str, moments: Tensor, merged: tuple[Tensor, Tensor]) -> None:
    bad = (~torch.isfinite(moments)).any(1).nonzero().flatten().tolist()
    if bad or not all(bool(torch.isfinite(value).all()) for value in merged):
        where = f"in process {bad[0]}" if bad else f"once merged, as {merged[0].dtype}"
        raise BatchNormError(
            f"the running statistics of {name or '(root)'!r} are not finite {where}, and would be so in all processes. "
            "Nothing was written. Look for the first layer with non-finite activations "
            "(bn_lightning.observe_activations), or leave it out with exclude=."
        )
