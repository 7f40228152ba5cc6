"""A momentum that is not what its owner means by it."""

from collections.abc import Iterator

from bn_lightning.auditing.finding import Finding, Repair
from bn_lightning.auditing.reading import AuditReading
from bn_lightning.auditing.rules.layers import are_fresh, may_move, trained_parameters
from bn_lightning.auditing.rules.rule import RECALIBRATE, Rule

__all__ = ["LARGE_MOMENTUM", "RULES", "SEVERE_GAP"]

# Networks in use weigh the new batch with 0.001 to 0.1, or 0.9 to 0.999 in the other convention; none stands between.
LARGE_MOMENTUM = 0.5
_USUAL = 0.1
# After 1000 updates the initial (0, 1) still weighs more than 90 %.
_LEAST = 1e-4
# Where evaluation's output is so many standard deviations off, what made it so is an error too.
SEVERE_GAP = 1.0


def _find_convention(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        momentum = row.layer.momentum
        if momentum is None or momentum < LARGE_MOMENTUM or not may_move(reading, row.layer):
            continue
        other = round(1 - momentum, 12)
        meant = other if 0 < other < LARGE_MOMENTUM else _USUAL
        yield rule.finding(
            row.name,
            f"momentum={momentum:g} weighs the new batch in torch, so that the running statistics are little more than "
            "the last batch's; TensorFlow, Keras and JAX weigh the old value",
            {"momentum": momentum, "batches_averaged": round((2 - momentum) / momentum, 3), "meant": meant},
            f"momentum={meant:g}, that is 1 − {momentum:g}, and {RECALIBRATE}"
            if meant == other
            else f"momentum={meant:g}, and {RECALIBRATE}",
            severity="error" if row.gap is not None and row.gap >= SEVERE_GAP else "warning",
            repair=Repair("momentum", meant),
        )


def _find_zero(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    trained = trained_parameters(reading)
    for row in reading.layers:
        layer = row.layer
        if layer.momentum is None or not 0 <= layer.momentum < _LEAST or not may_move(reading, layer):
            continue
        fresh = are_fresh(layer)
        affine = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
        learning = layer.training and (not affine or any(id(parameter) in trained for parameter in affine))
        updates = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
        yield rule.finding(
            row.name,
            f"momentum={layer.momentum:g} {'hardly' if layer.momentum else 'never'} moves the running statistics, "
            "while training normalizes by the batch" + (": they are still (0, 1), as at creation" if fresh else ""),
            {"momentum": layer.momentum, "num_batches_tracked": updates, "fresh": int(fresh)},
            f"momentum={_USUAL:g}, and {RECALIBRATE}; to freeze the layer, "
            'bn_lightning.convert_batch_norm(model, "frozen")',
            severity="error" if fresh or learning else "warning",
            repair=Repair("momentum", _USUAL),
        )


RULES = (
    Rule(
        "momentum-convention",
        "error",
        f"momentum ≥ {LARGE_MOMENTUM:g} (the weight of the new batch): warning; with a gap ≥ {SEVERE_GAP:g} output std "
        "error",
        _find_convention,
    ),
    Rule(
        "momentum-zero",
        "error",
        f"momentum < {_LEAST:g}, the layer not frozen (error: training, or still (0, 1); warning: else)",
        _find_zero,
    ),
)
