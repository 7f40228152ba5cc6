"""What the running statistics of every BatchNorm layer tell, read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.grouped import add_groups
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

__all__ = ["RecentStep", "RunningChannels", "RunningRow", "RunningSnapshot", "describe_layers"]

# A channel that less than one value in a thousand leaves above zero.
_DEAD = 1e-3


@dataclass(frozen=True, slots=True)
class RunningChannels:
    """Each channel of one layer, float64 on the CPU, over the optimizer steps since the last reading.

    Attributes:
        steps: (C,), how many of them moved the running statistics; everything else is NaN where there was none.
        batch_mean: (C,), mean of the steps' batch means, activation units.
        batch_mean_std: (C,), their standard deviation, ``correction=1``, activation units; NaN below two steps.
        batch_var: (C,), mean of the steps' batch variances (``correction=1``), activation units squared.
        mean_resolution: (C,), the most by which rounding can have put a step's batch mean off, activation units.
        var_resolution: (C,), the same of its variance, activation units squared.
        running_mean: (C,), as it is now.
        running_var: (C,), as it is now.
        weight: (C,), as it is now; ones without one.
        bias: (C,), as it is now; zeros without one.
    """

    steps: Tensor
    batch_mean: Tensor
    batch_mean_std: Tensor
    batch_var: Tensor
    mean_resolution: Tensor
    var_resolution: Tensor
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class RunningRow:
    """One layer. Values in units of σ = √(running_var + eps) are root mean squares over its channels.

    Attributes:
        layer: Its name.
        channels: C.
        updates: How often the running statistics were moved an optimizer step, on average.
        drift: |mean of the batch means − running mean|, in σ; ``None`` if unknown: no update, or below the resolution.
        noise: Standard deviation of the batch means from step to step, in σ; ``None`` if unknown.
        spread: Geometric mean over the channels of batch σ / running σ; ``None`` if unknown.
        resolution: How far rounding can have put a batch mean off, in σ; ``None`` without an update.
        weight_rms: Root mean square of γ.
        bias_rms: Root mean square of β.
        dead_share: Share of channels of which, were the normalized values Gaussian, less than one in a thousand would
            pass a ReLU behind the layer.
        nonfinite: How many entries of the running statistics are NaN or infinite now.
        spoiled_steps: After how many optimizer steps since the last reading some were.
        first_spoiled: The first such step of the fit; ``None`` if there was none.
        restored: How often finite statistics were put back in the fit.
        steps: How many optimizer steps since the last reading moved the running statistics.
        batches: How many batches they hold in all; ``None`` if nothing was measured.
        momentum: The weight of a new batch; ``None`` for the average of all batches.
        reason: Why nothing, or not everything, was measured; empty otherwise.
    """

    layer: str
    channels: int
    updates: float | None = None
    drift: float | None = None
    noise: float | None = None
    spread: float | None = None
    resolution: float | None = None
    weight_rms: float | None = None
    bias_rms: float | None = None
    dead_share: float | None = None
    nonfinite: int = 0
    spoiled_steps: int = 0
    first_spoiled: int | None = None
    restored: int = 0
    steps: int = 0
    batches: int | None = None
    momentum: float | None = None
    reason: str = ""

    @property
    def remark(self) -> str:
        """What is worth a second look, in words; empty for most layers."""
        remarks = [self.reason] if self.reason else []
        if self.nonfinite:
            remarks.append(f"{self.nonfinite} nonfinite running statistics")
        if self.first_spoiled is not None:
            remarks.append(f"first nonfinite after step {self.first_spoiled}")
        if self.restored:
            remarks.append(f"restored {_times(self.restored)}")
        if self.updates is not None and self.updates not in (0.0, 1.0):
            remarks.append(f"{self.updates:.3g} updates a step")
        return "; ".join(remarks)


@dataclass(frozen=True, slots=True)
class RecentStep:
    """One layer after one of the last optimizer steps.

    Attributes:
        step: The optimizer step.
        updates: How often its running statistics were moved.
        nonfinite: How many entries of them were NaN or infinite afterwards.
        shift: Root mean square over the channels of (batch mean − running mean before) / running σ before; NaN without
            an update.
    """

    step: int
    updates: int
    nonfinite: int
    shift: float


@dataclass(frozen=True, slots=True)
class RunningSnapshot(Tabled):
    """Every BatchNorm layer, in the order of the network's definition.

    Attributes:
        rows: One a layer.
        step: The last optimizer step that is in it; ``None`` if there was none.
        recent: Layer to its last steps, the oldest first.
    """

    rows: tuple[RunningRow, ...]
    step: int | None
    recent: Mapping[str, Sequence[RecentStep]]
    _channels: Mapping[str, RunningChannels] = field(repr=False)

    def channels(self, layer: str) -> RunningChannels:
        """Return one layer channel by channel.

        Raises:
            BatchNormError: If there is no such layer, or nothing was measured of it.
        """
        if layer in self._channels:
            return self._channels[layer]
        for row in self.rows:
            if row.layer == layer:
                raise BatchNormError(f"nothing was measured of {layer!r}: {row.reason}.")
        known = ", ".join(repr(row.layer) for row in self.rows[:5])
        raise BatchNormError(f"there is no BatchNorm layer {layer!r}; the {len(self.rows)} watched begin with {known}.")

    def to_dict(self) -> dict[str, dict[str, float | int | str | None]]:
        """Return the fields of `RunningRow` by layer."""
        return {row.layer: asdict(row) for row in self.rows}

    def totals(self) -> dict[str, float]:
        """Return what sums the whole network up; a value that no layer has is not there."""
        worst = {
            name: [value for row in self.rows if (value := getattr(row, name)) is not None]
            for name in ("drift", "noise")
        }
        totals = {f"worst_{name}": max(values) for name, values in worst.items() if values}
        totals["nonfinite"] = float(sum(row.nonfinite for row in self.rows))
        restored = sum(row.restored for row in self.rows)
        return {**totals, "restored": float(restored)} if restored else totals

    def table(self) -> Table:
        """Return one row a layer."""
        at = "" if self.step is None else f" at optimizer step {self.step}"
        columns = ("layer", "drift", "noise", "spread", "γ", "β", "dead %", "remark")
        rows = [
            (
                row.layer,
                row.drift,
                row.noise,
                row.spread,
                row.weight_rms,
                row.bias_rms,
                None if row.dead_share is None else 100 * row.dead_share,
                row.remark,
            )
            for row in self.rows
        ]
        notes = (
            "drift: batch means against the running mean; noise: batch means from step to step; both in running σ",
            "spread: batch σ by running σ; γ, β: root mean squares; dead %: channels a ReLU behind would leave at zero",
            "a dash: no update, too small to tell from rounding, or no noise in a single step",
        )
        layers = "layer" if len(self.rows) == 1 else "layers"
        return Table(f"running statistics of {len(self.rows)} BatchNorm {layers}{at}", columns, rows, notes)


def describe_layers(
    layers: Sequence[str], widths: Sequence[int], channels: RunningChannels, *, eps: Sequence[float]
) -> list[RunningRow]:
    """Sum the channels of layers up, all at once; what is counted on the device stays 0.

    Args:
        layers: Their names.
        widths: How many channels each has.
        channels: Those of all layers, side by side.
        eps: Of each layer.
    """
    widest = torch.tensor(widths, dtype=torch.int64, device="cpu")
    epsilon = torch.tensor(eps, dtype=torch.float64, device="cpu").repeat_interleave(widest)

    def mean(values: Tensor) -> list[float]:
        means: list[float] = (add_groups(values.double(), widths) / widest).tolist()
        return means

    def rms(values: Tensor) -> list[float]:
        return [math.sqrt(square) for square in mean(values.square())]

    variance = channels.running_var + epsilon
    sigma = variance.sqrt()
    active = torch.special.ndtr(channels.bias / channels.weight.abs())
    active = torch.where(channels.weight == 0, (channels.bias > 0).double(), active)
    held = channels.running_mean.isfinite().int() + channels.running_var.isfinite()
    columns = zip(
        layers,
        widths,
        rms((channels.batch_mean - channels.running_mean) / sigma),
        rms(channels.batch_mean_std / sigma),
        mean(((channels.batch_var + epsilon) / variance).log() / 2),
        mean(channels.var_resolution < channels.batch_var),
        rms(channels.mean_resolution / sigma),
        rms(channels.weight),
        rms(channels.bias),
        mean(active < _DEAD),
        mean(2 - held),
        [int(steps.max()) for steps in channels.steps.split(list(widths))],
        strict=True,
    )
    return [
        RunningRow(
            layer,
            width,
            drift=_known(drift, resolution),
            noise=_known(noise, resolution),
            spread=_known(math.exp(spread), 0.0) if known == 1 else None,
            resolution=_known(resolution, -1.0),
            weight_rms=weight,
            bias_rms=bias,
            dead_share=dead,
            nonfinite=round(lost * width),
            steps=steps,
        )
        for layer, width, drift, noise, spread, known, resolution, weight, bias, dead, lost, steps in columns
    ]


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _known(value: float, resolution: float) -> float | None:
    return value if math.isfinite(value) and value > resolution else None
