"""What goes wrong in activations."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

from bn_lightning.functional.activation import Row
from bn_lightning.monitoring.alerts.symptom import PATIENCE, Symptom
from bn_lightning.monitoring.snapshot import ActivationSnapshot

__all__ = ["DeadChannels", "Nonfinite", "Saturation", "ScaleJump"]

# So many values of a channel that is above zero for one in a hundred show it so with 95 %: 0.99³⁰⁰ = 0.05.
_VALUES_TO_CALL_DEAD = 300
# Samples a layer's present scale is compared with.
_WINDOW = 10
_FEWEST = 5
# Robust standard deviations; a steady trend in the logarithm stays below 2.
_OUTLYING = 8.0
# A Gaussian's standard deviation by its median absolute deviation.
_SIGMA_BY_MAD = 1.4826
# Far below any scale: the logarithm of a constant layer's.
_SMALLEST = 1e-300


class Nonfinite(Symptom[ActivationSnapshot]):
    """NaN or infinite values. At once: there is no way back from most."""

    rule = "nonfinite"
    begins = ends = 0.0
    patience = 1
    names_first = True

    def measure(self, sample: ActivationSnapshot) -> Mapping[str, float]:
        """Count them."""
        return {name: float(row.nonfinite) if row.count else math.nan for name, row in sample.rows.items()}

    def describe(self, layer: str, value: float, sample: ActivationSnapshot) -> tuple[str, str]:
        """Name the first layer in order of execution."""
        return (
            f"{value:.0f} of its {sample.rows[layer].count} values are NaN or infinite, where all should be finite; it "
            "is the first such layer in order of execution",
            "Look for what it divides by, for an overflow under float16, and for nonfinite inputs or weights; else "
            "lower the learning rate or clip gradients",
        )


@dataclass(slots=True)
class _Zeros:
    """Channels that were zero throughout the last samples, and how much that is worth."""

    dead: Tensor
    values: int
    samples: int = 1

    @property
    def share(self) -> float:
        return int(self.dead.sum()) / len(self.dead)


class DeadChannels(Symptom[ActivationSnapshot]):
    """More than half of a layer's channels are zero throughout.

    For layers whose zeros mean something: whose smallest value is not below zero, as of a ReLU and of the pooling after
    it. Only channels count that were zero in all of the last samples, of which there have to be enough to tell a dead
    channel from a rare one.
    """

    rule = "dead"
    # Healthy: 0.39 at most, in one sample. Sick: 0.8 and more.
    begins = 0.5
    ends = 0.4
    patience = 1

    def __init__(self) -> None:
        super().__init__()
        self._zeros: dict[str, _Zeros] = {}

    def measure(self, sample: ActivationSnapshot) -> Mapping[str, float]:
        """Return the share of channels dead so far; NaN while that is not enough to say so."""
        return {
            name: self._share(name, row.dead_channels / row.channels, sample)
            for name, row in sample.rows.items()
            if row.count and row.channels and row.min >= 0 and _can_die(name, sample)
        }

    def describe(self, layer: str, value: float, sample: ActivationSnapshot) -> tuple[str, str]:
        """Say how sure it is."""
        zeros = self._zeros[layer]
        return (
            f"{int(zeros.dead.sum())} of its {len(zeros.dead)} channels were exactly 0 in the last {zeros.samples} "
            f"samples, {zeros.values} values or more of each; at most half are expected",
            "They get no gradient and stay dead: lower the learning rate or warm it up, look at biases, or use a "
            "leaky activation",
        )

    def _share(self, layer: str, share: float, sample: ActivationSnapshot) -> float:
        if share <= self.begins:
            self._zeros.pop(layer, None)
            return share
        block = sample.blocks[layer]
        new = _Zeros(block[Row.ZEROS] == block[Row.COUNT], int(block[Row.COUNT].min()))
        old = self._zeros.get(layer)
        if old is not None and old.dead.shape == new.dead.shape:
            both = _Zeros(new.dead & old.dead, new.values + old.values, old.samples + 1)
            new = both if both.share > self.begins else new
        self._zeros[layer] = new
        enough = new.samples >= PATIENCE and new.values >= _VALUES_TO_CALL_DEAD
        return new.share if enough else math.nan


class Saturation(Symptom[ActivationSnapshot]):
    """The largest magnitude is near what the output's dtype can hold."""

    rule = "saturation"
    # One doubling away from an overflow. Healthy: 0.0004 at most, under float16.
    begins = 0.5
    ends = 0.25

    def measure(self, sample: ActivationSnapshot) -> Mapping[str, float]:
        """Return it as a share of the largest finite value."""
        return {name: row.saturation for name, row in sample.rows.items() if not row.nonfinite}

    def describe(self, layer: str, value: float, sample: ActivationSnapshot) -> tuple[str, str]:
        """Say how near."""
        return (
            f"its largest magnitude is {value:.0%} of what its dtype can hold, at most {self.begins:.0%} is expected",
            "It is about to overflow: use bfloat16, scale the layer's input or weights down, or normalize before it",
        )


@dataclass(slots=True)
class _Scale:
    """A layer's log₂ standard deviations, at one distance of samples."""

    step: int | None
    gap: int | None = None
    known: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    pending: list[float] = field(default_factory=list)


class ScaleJump(Symptom[ActivationSnapshot]):
    """The standard deviation is far from the median of the layer's last samples, and further than they differ.

    Only samples at about the same distance are compared: what changes within 50 steps is no jump against what did not
    within one. After a jump the new scale is the expected one.
    """

    rule = "scale-jump"
    # Doublings. Healthy: above 1 only where that is less than 3 robust standard deviations. Sick: 3 and more.
    begins = 2.0
    ends = 1.0
    names_first = True

    def __init__(self) -> None:
        super().__init__()
        self._scales: dict[str, _Scale] = {}

    def measure(self, sample: ActivationSnapshot) -> Mapping[str, float]:
        """Return the jump in doublings; 0 within the noise, NaN after too few samples."""
        return {
            name: self._jump(name, math.log2(max(row.std, _SMALLEST)), sample.step)
            for name, row in sample.rows.items()
            if row.count > 1 and math.isfinite(row.std)
        }

    def describe(self, layer: str, value: float, sample: ActivationSnapshot) -> tuple[str, str]:
        """Say from where to where."""
        return (
            f"its standard deviation is {sample.rows[layer].std:.3g}, {_times(value)} away from the median of its last "
            f"samples for {self.patience} samples in a row; {_times(self.begins)} is the most expected",
            "Look at what changed: the learning rate, the data or its preprocessing, or weights that were loaded",
        )

    def _jump(self, layer: str, value: float, step: int | None) -> float:
        scale = self._scales.get(layer)
        if scale is None:
            scale = self._scales[layer] = _Scale(step)
        elif step is not None and scale.step is not None:
            gap, scale.step = step - scale.step, step
            if scale.gap is not None and not scale.gap / 2 <= gap <= 2 * scale.gap:
                scale.pending.clear()
                scale.known.clear()
            scale.gap = gap
        if len(scale.known) < _FEWEST:
            scale.known.append(value)
            return math.nan
        middle = median(scale.known)
        if middle <= math.log2(_SMALLEST):  # what was constant before has no scale to jump from
            scale.known.clear()
            scale.known.append(value)
            return math.nan
        noise = _SIGMA_BY_MAD * median(abs(other - middle) for other in scale.known)
        jump = abs(value - middle)
        if jump <= self.begins or jump <= _OUTLYING * noise:
            scale.pending.clear()
            scale.known.append(value)
            return jump if jump <= self.begins else 0.0
        scale.pending.append(value)
        if len(scale.pending) == self.patience:
            scale.known.clear()
            scale.known.extend(scale.pending)
            scale.pending.clear()
        return jump


def _can_die(layer: str, sample: ActivationSnapshot) -> bool:
    """Tell whether zeros could mean dead units: not in integers, masks, and a normalization whose scale is 0 yet."""
    floating = not math.isnan(sample.limits.get(layer, 0.0))
    return floating and "Norm" not in sample.kinds.get(layer, "")


def _times(doublings: float) -> str:
    return f"a factor of {2 ** min(doublings, 1000):.3g}"
