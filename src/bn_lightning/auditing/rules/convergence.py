"""Running statistics that have not arrived at the population statistics."""

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from bn_lightning.auditing.finding import Finding, Repair
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.rules.layers import are_fresh, fresh_half, may_move
from bn_lightning.auditing.rules.momentum import LARGE_MOMENTUM, SEVERE_GAP
from bn_lightning.auditing.rules.rule import RECALIBRATE, Rule
from bn_lightning.auditing.rules.statistics import NOTEWORTHY_GAP
from bn_lightning.layers.debiased import DebiasedBatchNorm

__all__ = ["RULES"]

# Lower bounds of the gap, worst first.
_TIERS = {"error": SEVERE_GAP, "warning": 0.25, "info": NOTEWORTHY_GAP}
# The same of the weight that the initial (0, 1) still has, where there is no data to measure a gap on.
_REMAINING = {"warning": 0.1, "info": 0.01}
_AFTER_AVERAGING = f"{RECALIBRATE} after the averaged weights are in place; under a Trainer, RecalibrateBatchNorm()"


def _find_lag(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    averaging = _averaging(reading)
    for row in reading.layers:
        if row.name not in averaging:
            yield from _by_count(rule, reading, row) if row.population is None else _by_gap(rule, row)


def _by_gap(rule: Rule, row: LayerReading) -> Iterator[Finding]:
    severity = _severity(row)
    if severity is None:
        return
    updates, remaining = _updates(row.layer), _initial_share(row.layer)
    yield rule.finding(
        row.name,
        f"evaluation's output is {row.gap:.2g} standard deviations from what the training data's statistics give; "
        + _cause(row.layer, updates, remaining),
        {
            "gap": row.gap,
            "num_batches_tracked": updates,
            "momentum": row.layer.momentum,
            "initial_share": remaining,
        },
        RECALIBRATE,
        severity=severity,
        repair=Repair("recalibrate"),
    )


def _by_count(rule: Rule, reading: AuditReading, row: LayerReading) -> Iterator[Finding]:
    layer, updates, share = row.layer, _updates(row.layer), _initial_share(row.layer)
    if not updates or share is None or layer.momentum == 0 or layer.running_var is None:
        return
    severity = next((name for name, bound in _REMAINING.items() if share > bound), None)
    # An average in which the first variance, 1, still weighs so much cannot be below that share of it: such
    # statistics were loaded, recalibrated or averaged otherwise.
    if severity is None or are_fresh(layer) or not bool((layer.running_var >= 0.99 * share).all()):
        return
    if not may_move(reading, layer) or isinstance(layer, DebiasedBatchNorm):
        return
    yield rule.finding(
        row.name,
        f"after {updates} updates with momentum={layer.momentum:g} the initial (0, 1) still weighs {share:.0%} of the "
        "running statistics; give training batches to see what that does",
        {"gap": None, "num_batches_tracked": updates, "momentum": layer.momentum, "initial_share": share},
        f"train longer or raise the momentum; at the end {RECALIBRATE}",
        severity=severity,
        repair=Repair("recalibrate"),
    )


def _find_averaged(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    averaging = _averaging(reading)
    rows = [row for row in reading.layers if row.name in averaging]
    for row in rows:
        severity = _severity(row)
        if severity is not None:
            yield rule.finding(
                row.name,
                f"the weights are averaged ({averaging[row.name]}), and the running statistics are not those of "
                f"the averaged weights: evaluation's output is {row.gap:.2g} standard deviations from what they give "
                "on the training data",
                {"gap": row.gap, "averaging": averaging[row.name], "num_batches_tracked": _updates(row.layer)},
                _AFTER_AVERAGING,
                severity=severity,
                repair=Repair("recalibrate"),
            )
    unmeasured = [row for row in rows if row.population is None and may_move(reading, row.layer)]
    if unmeasured:
        by = averaging[unmeasured[0].name]
        yield rule.finding(
            None,
            f"the weights are averaged ({by}): running statistics gathered under other weights, or averaged "
            "themselves, need not be those of the averaged weights; give training batches to measure them",
            {"averaging": by, "layers": len(unmeasured)},
            _AFTER_AVERAGING,
            severity="info",
        )


def _severity(row: LayerReading) -> str | None:
    # A frozen layer trains on its running statistics: evaluation does nothing else.
    if row.gap is None or row.population is None or row.population.frozen:
        return None
    if are_fresh(row.layer) or fresh_half(row.layer) is not None:
        return None  # of which fresh-statistics tells
    gap = row.gap
    return next((name for name, bound in _TIERS.items() if gap >= bound), None)


def _averaging(reading: AuditReading) -> dict[str, str]:
    """Name what averages the weights of each layer for which something does."""
    if reading.training is not None and reading.training.averaging:
        return dict.fromkeys((row.name for row in reading.layers), ", ".join(reading.training.averaging))
    averaged = {name: module for name, module in reading.model.named_modules() if isinstance(module, AveragedModel)}
    return {
        row.name: type(module).__name__
        for name, module in averaged.items()
        for row in reading.layers
        if row.name.startswith(f"{name}." if name else "")
    }


def _updates(layer: _BatchNorm) -> int | None:
    return None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)


def _initial_share(layer: _BatchNorm) -> float | None:
    """(1 − m)ⁿ, the weight (0, 1) still has after n updates; momentum m weighs the new batch."""
    updates = _updates(layer)
    if layer.momentum is None or updates is None:
        return None
    return float((1 - layer.momentum) ** updates)


def _cause(layer: _BatchNorm, updates: int | None, remaining: float | None) -> str:
    if layer.momentum is not None and layer.momentum >= LARGE_MOMENTUM:
        return f"momentum={layer.momentum:g} weighs the new batch: they are little more than the last batch's"
    if remaining is None or remaining <= _REMAINING["info"]:
        return "the weights or the data changed faster than the moving average follows, or its batches were too small"
    return (
        f"after {updates} updates with momentum={layer.momentum:g} the initial (0, 1) still weighs {remaining:.0%}: "
        "train longer or raise the momentum"
    )


def _said(tiers: dict[str, float], sign: str) -> str:
    return ", ".join(f"{sign} {bound:g} ({name})" for name, bound in reversed(tiers.items()))


_GAPS = f"gap {_said(_TIERS, '≥')} output std"

RULES = (
    Rule(
        "not-converged",
        "error",
        f"{_GAPS}; without data (1 − momentum)^num_batches_tracked {_said(_REMAINING, '>')}",
        _find_lag,
    ),
    Rule(
        "averaged-weights",
        "error",
        f"{_GAPS}, with averaged weights; without data: averaged weights (info)",
        _find_averaged,
    ),
)
