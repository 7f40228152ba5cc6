"""Watch what BatchNorm layers compute anyway: no hook, no pass over data."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.functional.moments import accumulation_dtype
from bn_lightning.functional.recovered import recover_batch_statistics, update_weight
from bn_lightning.layers.debiased import DebiasedBatchNorm
from bn_lightning.monitoring.host import copy_to_host
from bn_lightning.monitoring.running_snapshot import (
    RecentStep,
    RunningChannels,
    RunningRow,
    RunningSnapshot,
    describe_layers,
)

__all__ = ["RunningStatisticsWatch"]

# Steps that are remembered.
_RECENT = 20


class RunningStatisticsWatch:
    """Recover the batch statistics of each optimizer step from the change of the running ones.

    Everything stays on the device until `read`, which copies one tensor. Until then it keeps the mean and the spread
    of each channel's batch means (Welford's update) and the mean of its batch variances; and of the last 20
    steps, whatever was read meanwhile, a few numbers a layer.

    Args:
        layers: Name to BatchNorm layer. One without running statistics, or whose running average follows a rule of its
            own, is a row with its reason.
        restore: Put a layer's last finite running statistics back after a step that leaves others, on the device.

    Example:
        >>> bn = nn.BatchNorm1d(2)
        >>> watch = RunningStatisticsWatch({"bn": bn})
        >>> watch.begin()
        >>> _ = bn(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        >>> watch.end(step=0)
        >>> watch.read().channels("bn").batch_mean.float().tolist()
        [2.0, 10.0]
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, restore: bool = False) -> None:
        self.restore = restore
        self._reasons = {name: reason for name, layer in layers.items() if (reason := _unwatchable(layer))}
        self._names = tuple(layers)
        self._layers = {
            name: layer for name, layer in layers.items() if name not in self._reasons and isinstance(layer, _BatchNorm)
        }
        buffers = [buffer for layer in self._layers.values() for buffer in _statistics(layer)]
        self._device = buffers[0].device if buffers else torch.device("cpu")
        self._wide = accumulation_dtype(self._device)
        stored = torch.float64 if any(buffer.dtype == torch.float64 for buffer in buffers) else torch.float32
        self._eps = max((torch.finfo(buffer.dtype).eps for buffer in buffers), default=0.0)
        self._widths = [layer.num_features for layer in self._layers.values()]
        self._owner = torch.tensor(
            [index for index, width in enumerate(self._widths) for _ in range(width)],
            dtype=torch.int64,
            device=self._device,
        )
        self._width = torch.tensor(self._widths, dtype=self._wide, device=self._device)[self._owner]
        # Before and after the step, and when they were finite last: mean and variance of each channel.
        self._flat = torch.zeros(3, 2, sum(self._widths), dtype=stored, device=self._device)
        self._views = [[*rows[0].split(self._widths), *rows[1].split(self._widths)] for rows in self._flat]
        self._counts = torch.zeros(2, len(self._widths), dtype=torch.int64, device=self._device)
        self._momenta: list[float | None] = []
        self._momentum = torch.empty(0, device=self._device)
        self._recent = torch.zeros(_RECENT, 3, len(self._widths), dtype=self._wide, device=self._device)
        self._steps: list[int] = []
        self._ended = 0
        self._first_bad = torch.full((len(self._widths),), -1.0, dtype=self._wide, device=self._device)
        self._restored = torch.zeros(len(self._widths), dtype=torch.int64, device=self._device)
        self._widths_of_others = {name: getattr(layers[name], "num_features", 0) for name in self._reasons}
        self._clear()
        if self.restore:
            self._copy(2)

    @property
    def has_steps(self) -> bool:
        """Whether an optimizer step ended since the last reading."""
        return self._ended > self._read_until

    def begin(self) -> None:
        """Remember the running statistics as they are before an optimizer step."""
        self._copy(0)

    @torch.no_grad()
    def end(self, step: int) -> None:
        """Take in what an optimizer step, all its micro-batches, has made of them.

        Args:
            step: Its number.
        """
        self._copy(1)
        before, after = self._flat[0].to(self._wide), self._flat[1].to(self._wide)
        updates = self._counts[1] - self._counts[0]
        weight = self._spread(update_weight(self._momenta_now(), updates, self._counts[1]))
        value, resolution = recover_batch_statistics(before, after, weight, self._spread(updates), eps=self._eps)
        self._add(value, resolution)
        bad = self._by_layer((~after.isfinite()).any(0))
        self._first_bad = torch.where((bad > 0) & (self._first_bad < 0), step, self._first_bad)
        moved = (value[0] - before[0]).square() / before[1] / self._width
        self._recent[self._ended % _RECENT] = torch.stack([updates, bad, self._by_layer(moved).sqrt()])
        self._ended += 1
        self._steps = [*self._steps, step][-_RECENT:]
        self._counted += torch.stack([updates, (bad > 0).long()])
        if self.restore and self._layers:
            self._put_back(bad > 0)

    def start_reading(self) -> Callable[[], RunningSnapshot]:
        """Start to copy what was collected since the last reading, and begin anew; nothing waits for the device.

        Returns:
            What gives the snapshot.
        """
        steps = list(self._steps)
        recent = self._recent.roll(-self._ended, 0)[_RECENT - len(steps) :]
        per_layer = torch.stack([*self._counted, self._first_bad, self._restored, self._counts[1]])
        parts = [torch.cat([self._kept, self._present()]), per_layer, recent]
        finish = copy_to_host(torch.cat([part.to(self._wide).flatten() for part in parts]))
        ended = self._ended - self._read_until
        self._clear()

        def snapshot() -> RunningSnapshot:
            values = finish().double()
            columns, layers, last = (
                piece.view(shape)
                for piece, shape in zip(
                    values.split([part.numel() for part in parts]), [part.shape for part in parts], strict=True
                )
            )
            return self._snapshot(columns, layers, last, steps, ended)

        return snapshot

    def read(self) -> RunningSnapshot:
        """Copy what was collected since the last reading to the host, in one transfer, and begin anew."""
        return self.start_reading()()

    def _snapshot(
        self, columns: Tensor, layers: Tensor, recent: Tensor, steps: list[int], ended: int
    ) -> RunningSnapshot:
        whole = _channels(columns)
        watched = list(self._layers)
        found = describe_layers(watched, self._widths, whole, eps=[layer.eps for layer in self._layers.values()])
        described = dict(zip(watched, zip(found, layers.mT.tolist(), strict=True), strict=True))
        rows = []
        for name in self._names:
            if name in self._reasons:
                rows.append(RunningRow(name, self._widths_of_others[name], reason=self._reasons[name]))
                continue
            row, (updates, spoiled, first_bad, restored, batches) = described[name]
            rows.append(
                replace(
                    row,
                    updates=updates / max(ended, 1),
                    spoiled_steps=int(spoiled),
                    first_spoiled=None if first_bad < 0 else int(first_bad),
                    restored=int(restored),
                    batches=int(batches),
                    momentum=self._layers[name].momentum,
                )
            )
        past = {
            name: tuple(
                RecentStep(step, int(updates), int(bad), shift)
                for step, (updates, bad, shift) in zip(steps, rows_of_layer, strict=True)
            )
            for name, rows_of_layer in zip(self._layers, recent.permute(2, 0, 1).tolist(), strict=True)
        }
        apart = zip(*(getattr(whole, field.name).split(self._widths) for field in fields(whole)), strict=True)
        channels = {name: RunningChannels(*each) for name, each in zip(watched, apart, strict=True)}
        return RunningSnapshot(tuple(rows), steps[-1] if steps else None, past, channels)

    def _copy(self, place: int) -> None:
        """Copy the running statistics as they are now, and how often they were moved."""
        if not self._layers:
            return
        layers = self._layers.values()
        means, variances = zip(*map(_statistics, layers), strict=True)
        torch._foreach_copy_(self._views[place], [*means, *variances])
        if place < 2:
            counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
            torch._foreach_copy_(list(self._counts[place].unbind()), counts)

    def _momenta_now(self) -> Tensor:
        momenta = [layer.momentum for layer in self._layers.values()]
        if momenta != self._momenta:
            self._momenta = momenta
            values = [torch.nan if momentum is None else momentum for momentum in momenta]
            self._momentum = torch.tensor(values, dtype=self._wide, device=self._device)
        return self._momentum

    def _add(self, value: Tensor, resolution: Tensor) -> None:
        """Take the batch statistics of one step in (Welford's update), where there are any."""
        known = value.isfinite().all(0)
        count, mean, m2, var = self._kept[:4]
        count += known
        share = known / count.clamp(min=1)
        difference = torch.where(known, value[0] - mean, 0.0)
        mean += difference * share
        m2 += difference * torch.where(known, value[0] - mean, 0.0)
        var += torch.where(known, value[1] - var, 0.0) * share
        torch.where(known, torch.fmax(self._kept[4:], resolution), self._kept[4:], out=self._kept[4:])

    def _put_back(self, bad: Tensor) -> None:
        """Put the last finite statistics of layers back, and remember the present ones of the others."""
        spoiled = self._spread(bad)
        torch.where(spoiled, self._flat[2], self._flat[1], out=self._flat[2])
        layers = self._layers.values()
        means, variances = zip(*map(_statistics, layers), strict=True)
        torch._foreach_copy_([*means, *variances], self._views[2])
        self._restored += bad

    def _present(self) -> Tensor:
        """Stack what the layers hold now, (4, C): the running statistics, γ and β."""
        layers = self._layers.values()
        statistics = list(map(_statistics, layers))
        held = [
            [mean for mean, _ in statistics],
            [variance for _, variance in statistics],
            [_or_constant(layer.weight, layer, 1.0) for layer in layers],
            [_or_constant(layer.bias, layer, 0.0) for layer in layers],
        ]
        rows = [[each.detach().to(self._device, self._wide) for each in row] for row in held]
        return torch.stack([torch.cat(row) if row else self._kept[0] for row in rows])

    def _clear(self) -> None:
        self._kept = torch.zeros(6, len(self._owner), dtype=self._wide, device=self._device)
        # Updates of each layer, and optimizer steps after which it was nonfinite.
        self._counted = torch.zeros(2, len(self._widths), dtype=torch.int64, device=self._device)
        self._read_until = self._ended

    def _spread(self, layers: Tensor) -> Tensor:
        """Give each channel its layer's value; of the ways to index, this one starts no threads for it."""
        return layers.index_select(0, self._owner)

    def _by_layer(self, channels: Tensor) -> Tensor:
        """Add up channels, by layer."""
        zeros = torch.zeros(len(self._widths), dtype=self._wide, device=self._device)
        return zeros.index_add_(0, self._owner, channels.to(self._wide))


def _unwatchable(layer: nn.Module) -> str:
    if not isinstance(layer, _BatchNorm):
        return f"{type(layer).__name__} is no BatchNorm layer of torch's family"
    if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
        return "it has no running statistics"
    if isinstance(layer, DebiasedBatchNorm):
        return "its running average follows a rule of its own (debiased)"
    return ""


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None
    assert variance is not None
    return mean, variance


def _or_constant(tensor: Tensor | None, layer: _BatchNorm, value: float) -> Tensor:
    return _statistics(layer)[0].new_full((layer.num_features,), value) if tensor is None else tensor


def _channels(block: Tensor) -> RunningChannels:
    steps, mean, m2, var, mean_resolution, var_resolution, *present = block
    none = steps == 0
    mean, var, mean_resolution, var_resolution = (
        each.masked_fill(none, torch.nan) for each in (mean, var, mean_resolution, var_resolution)
    )
    spread = (m2 / (steps - 1)).sqrt().masked_fill(steps < 2, torch.nan)
    return RunningChannels(steps.long(), mean, spread, var, mean_resolution, var_resolution, *present)
