"""What goes wrong in BatchNorm's running statistics."""

import math
from collections.abc import Mapping

from bn_lightning.monitoring.alerts.symptom import Symptom
from bn_lightning.monitoring.running_snapshot import RunningRow, RunningSnapshot

__all__ = ["Drift", "NonfiniteStatistics"]

# Optimizer steps in a reading, below which their mean says little.
_FEWEST_STEPS = 10
# What the initial (0, 1) may still weigh before a difference is not natural any more …
_INITIAL_SHARE = 0.01
# … and from how many updates on it is not natural in any case: torch's momentum 0.1 takes 44, TensorFlow's 0.01 459.
_ENOUGH_UPDATES = 500
# Times what noise alone would make; the root mean square over many channels hardly exceeds 1.
_ABOVE_NOISE = 2.0


class Drift(Symptom[RunningSnapshot]):
    """The running mean stays far from the batches': evaluation is not what was trained."""

    rule = "drift"
    # σ, where an audit's warning begins. Healthy: 0.24 in one reading, 0.14 in three in a row. Sick: 0.37 and more.
    begins = 0.25
    ends = 0.125

    def measure(self, sample: RunningSnapshot) -> Mapping[str, float]:
        """Return the drift, in σ; 0 within the noise, NaN where it is natural or not known."""
        return {row.layer: _drift(row) for row in sample.rows}

    def describe(self, layer: str, value: float, sample: RunningSnapshot) -> tuple[str, str]:
        """Say why, as far as can be told."""
        row = _row(layer, sample)
        share = _initial_share(row)
        if share > _INITIAL_SHARE:
            why = (
                f"After {row.batches} updates with momentum={row.momentum:g} the initial values still weigh {share:.0%}"
            )
        else:
            why = "The weights or the data change faster than the running average follows"
        return (
            f"its running mean is {value:.2g} σ from the mean of its last {row.steps} steps' batches, within "
            f"{self.begins:g} σ is expected",
            f"{why}, so evaluation differs from training: raise the momentum, shuffle the data, or recalibrate before "
            "evaluating (bn_lightning.recalibrate_batch_norm)",
        )


class NonfiniteStatistics(Symptom[RunningSnapshot]):
    """NaN or infinite running statistics, which an average never loses again."""

    rule = "nonfinite-statistics"
    begins = ends = 0.0
    patience = 1
    names_first = True

    def measure(self, sample: RunningSnapshot) -> Mapping[str, float]:
        """Count them, or the steps after which some had to be put back; the first spoiled layer comes first."""
        rows = sorted(sample.rows, key=lambda row: math.inf if row.first_spoiled is None else row.first_spoiled)
        return {row.layer: float(max(row.nonfinite, row.spoiled_steps)) for row in rows}

    def describe(self, layer: str, value: float, sample: RunningSnapshot) -> tuple[str, str]:
        """Say since when."""
        row = _row(layer, sample)
        since = "" if row.first_spoiled is None else f", first after optimizer step {row.first_spoiled}"
        found = f"running statistics were NaN or infinite{since}"
        if row.nonfinite:
            return found, (
                "Evaluation is nonfinite from now on: look for the batch that overflows, as under float16, and "
                "recalibrate, or train with BatchNormMonitor(on_nonfinite='restore')"
            )
        return f"{found}, and were put back", "Look for the batch that overflows, as under float16"


def _drift(row: RunningRow) -> float:
    if row.drift is None or row.batches is None or row.steps < _FEWEST_STEPS:
        return math.nan
    if _initial_share(row) > _INITIAL_SHARE and row.batches < _ENOUGH_UPDATES:
        return math.nan
    noise = row.noise if row.noise is not None else row.resolution or 0.0
    momentum = 0.0 if row.momentum is None else row.momentum
    # Of the running mean, and of the mean of the steps' batches.
    floor = noise * math.sqrt(momentum / (2 - momentum) + 1 / row.steps)
    return row.drift if row.drift > _ABOVE_NOISE * floor else 0.0


def _initial_share(row: RunningRow) -> float:
    """(1 − m)ⁿ, the weight (0, 1) still has after n updates; momentum m weighs the new batch."""
    if row.momentum is None or row.batches is None:
        return 0.0
    return float((1 - row.momentum) ** row.batches)


def _row(layer: str, sample: RunningSnapshot) -> RunningRow:
    return next(row for row in sample.rows if row.layer == layer)
