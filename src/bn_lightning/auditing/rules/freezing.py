"""Layers that are frozen by half, or in another mode than they should be."""

from collections.abc import Iterator

from bn_lightning.auditing.finding import Finding, Repair
from bn_lightning.auditing.history import LayerHistory
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.rules.layers import affine_parameters, are_fresh, is_frozen, trained_parameters
from bn_lightning.auditing.rules.rule import Rule
from bn_lightning.layers.frozen import FrozenBatchNorm

__all__ = ["RULES"]

_FREEZE = 'bn_lightning.convert_batch_norm(model, "frozen", include=[{name!r}])'


def _find_moving(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    trained = trained_parameters(reading)
    if not trained:
        return
    for row in reading.layers:
        layer, affine = row.layer, affine_parameters(row.layer)
        if not affine or any(id(parameter) in trained for parameter in affine):
            continue
        if isinstance(layer, FrozenBatchNorm) or layer.running_mean is None or not layer.track_running_stats:
            continue
        seen = _seen(reading, row)
        moves = reading.model.training and layer.training and layer.momentum != 0
        moved = None if seen is None else seen.forward_updates
        if not (moves if moved is None else moved > 0):
            continue
        held = "needs no gradient" if not any(parameter.requires_grad for parameter in affine) else "has no optimizer"
        yield rule.finding(
            row.name,
            f"its γ and β are frozen ({held}), but its running statistics "
            + ("move with every batch, being in training mode" if moved is None else "moved while training")
            + ": frozen weights then meet other statistics, and training normalizes by the batch",
            {"momentum": layer.momentum, "forward_updates": moved},
            _FREEZE.format(name=row.name) + "; or layer.eval() at each start of training, since .train() undoes it",
        )


def _find_untracked(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        layer = row.layer
        if layer.track_running_stats or layer.running_mean is None or isinstance(layer, FrozenBatchNorm):
            continue
        yield rule.finding(
            row.name,
            "track_running_stats=False on a layer that has running statistics freezes nothing but them: training "
            "normalizes by the batch, evaluation by the old statistics",
            {"track_running_stats": layer.track_running_stats, "gap": row.gap},
            f"{_FREEZE.format(name=row.name)}, or layer.track_running_stats = True to go on learning",
        )


def _find_mode(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    trained = trained_parameters(reading)
    for row in reading.layers:
        affine = affine_parameters(row.layer)
        # Without γ and β it is the weights before it that change, if any do.
        learns = any(id(parameter) in trained for parameter in affine) if affine else bool(trained)
        found = (
            _in_training_mode(rule, reading, row)
            or _seen_in_validation(rule, _seen(reading, row), row)
            or (_seen_in_training(rule, _seen(reading, row), row) if learns else None)
            or (_in_evaluation_mode(rule, reading, row) if learns else None)
        )
        if found is not None:
            yield found


def _in_training_mode(rule: Rule, reading: AuditReading, row: LayerReading) -> Finding | None:
    if reading.model.training or not row.layer.training or isinstance(row.layer, FrozenBatchNorm):
        return None
    return rule.finding(
        row.name,
        "it is in training mode in a model that is in evaluation mode: it normalizes by the batch, and every forward "
        "pass moves its running statistics",
        {"training": True},
        "model.eval() on the whole model, and look for what calls .train() on a part of it",
        repair=Repair("training", False),
    )


def _seen_in_validation(rule: Rule, seen: LayerHistory | None, row: LayerReading) -> Finding | None:
    if seen is None or not (seen.validation_updates or seen.validated_in_training_mode):
        return None
    return rule.finding(
        row.name,
        f"validation moved its running statistics {seen.validation_updates} times"
        if seen.validation_updates
        else "a validation batch began with the layer in training mode, so that it normalized by the batch",
        {
            "validation_updates": seen.validation_updates,
            "validated_in_training_mode": seen.validated_in_training_mode,
        },
        "model.eval() before validation, and look for what calls .train() in it",
    )


def _seen_in_training(rule: Rule, seen: LayerHistory | None, row: LayerReading) -> Finding | None:
    share = None if seen is None else seen.training_share
    if seen is None or share is None or isinstance(row.layer, FrozenBatchNorm):
        return None
    if share >= 1:
        return _never_moved(rule, seen, row)
    # From the first batch on and with statistics that were learned: how many detectors are fine-tuned.
    meant = share == 0 and not are_fresh(row.layer)
    return rule.finding(
        row.name,
        "it was in evaluation mode in every training batch though weights are trained: its running statistics stay as "
        "they were while the weights before it change"
        if share == 0
        else f"it was in training mode in only {share:.0%} of the training batches",
        {"training_share": share},
        f"model.train() when training goes on after validation; if it is meant to be frozen, "
        f"{_FREEZE.format(name=row.name)}",
        severity="info" if meant else "warning",
    )


def _never_moved(rule: Rule, seen: LayerHistory, row: LayerReading) -> Finding | None:
    layer = row.layer
    ran = row.population is not None and layer.momentum != 0 and layer.track_running_stats
    if not ran or seen.forward_updates != 0 or seen.backward_updates != 0:
        return None
    return rule.finding(
        row.name,
        "it began every training batch in training mode, and no batch moved its running statistics: the step runs it "
        "in evaluation mode, or with its statistics paused",
        {"forward_updates": 0.0},
        f"run it in training mode; if it is meant to be frozen, {_FREEZE.format(name=row.name)}",
        severity="warning",
    )


def _in_evaluation_mode(rule: Rule, reading: AuditReading, row: LayerReading) -> Finding | None:
    if not is_frozen(reading, row.layer) or isinstance(row.layer, FrozenBatchNorm):
        return None
    return rule.finding(
        row.name,
        "it is in evaluation mode in a model that is in training mode, while its γ and β are trained; if that is "
        "meant, the next .train() undoes it",
        {"training": False},
        f"model.train(), or {_FREEZE.format(name=row.name)}",
        severity="info",
    )


def _seen(reading: AuditReading, row: LayerReading) -> LayerHistory | None:
    return None if reading.history is None else reading.history.layers.get(row.name)


RULES = (
    Rule(
        "frozen-weights-moving-statistics",
        "warning",
        "γ and β are not trained, others are, and the running statistics move (any update, where training was watched)",
        _find_moving,
    ),
    Rule("untracked-freeze", "warning", "track_running_stats=False though running_mean is there", _find_untracked),
    Rule(
        "wrong-mode",
        "error",
        "training mode in a model in evaluation mode or in any validation batch (error); evaluation mode in some "
        "training batches though γ or β is trained, in all with fresh statistics, or never moved (warning); in all "
        "with learned statistics, or now (info)",
        _find_mode,
    ),
)
