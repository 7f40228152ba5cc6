"""Running statistics that have not arrived at the population statistics."""

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.reading import AuditReading
from bn_lightning.auditing.rules.rule import RECALIBRATE, Rule
from bn_lightning.auditing.rules.statistics import NOTEWORTHY_GAP, are_fresh

__all__ = ["RULES"]

# Lower bounds of the gap, worst first.
_TIERS = {"error": 1.0, "warning": 0.25, "info": NOTEWORTHY_GAP}
# The initial (0, 1) weighs more than this after too few updates.
_REMAINING = 0.01


def _find_lag(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        # A frozen layer trains on its running statistics: evaluation does nothing else.
        if row.gap is None or row.population.frozen or are_fresh(row.layer):
            continue
        gap = row.gap
        severity = next((name for name, bound in _TIERS.items() if gap >= bound), None)
        if severity is None:
            continue
        updates = None if row.layer.num_batches_tracked is None else int(row.layer.num_batches_tracked)
        remaining = _initial_share(row.layer.momentum, updates)
        yield rule.finding(
            row.name,
            f"evaluation's output is {gap:.2g} standard deviations from what the training data's statistics give; "
            + _cause(row.layer, updates, remaining),
            {
                "gap": gap,
                "num_batches_tracked": updates,
                "momentum": row.layer.momentum,
                "initial_share": remaining,
            },
            RECALIBRATE,
            severity=severity,
        )


def _initial_share(momentum: float | None, updates: int | None) -> float | None:
    """(1 − m)ⁿ, the weight (0, 1) still has after n updates; momentum m weighs the new batch."""
    if momentum is None or updates is None:
        return None
    return float((1 - momentum) ** updates)


def _cause(layer: _BatchNorm, updates: int | None, remaining: float | None) -> str:
    if remaining is None or remaining <= _REMAINING:
        return "the weights or the data changed faster than the moving average follows, or its batches were too small"
    return (
        f"after {updates} updates with momentum={layer.momentum:g} the initial (0, 1) still weighs {remaining:.0%}: "
        "train longer or raise the momentum"
    )


RULES = (
    Rule(
        "not-converged",
        "error",
        "gap ≥ " + ", ≥ ".join(f"{bound:g} ({name})" for name, bound in reversed(_TIERS.items())) + " output std",
        _find_lag,
    ),
)
