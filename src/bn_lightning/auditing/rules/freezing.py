"""Layers that are frozen by half, or in another mode than they should be."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from bn_lightning.auditing.finding import Finding, Repair
from bn_lightning.auditing.history import LayerHistory
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.rules.layers import (
    affine_parameters,
    are_fresh,
    is_averaged,
    is_frozen,
    learned_weights,
    may_move,
    trained_parameters,
)
from bn_lightning.auditing.rules.rule import Rule
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.frozen import FrozenBatchNorm

__all__ = ["RULES", "moves_frozen"]

_FREEZE = 'bn_lightning.convert_batch_norm(model, "frozen", include=[{name!r}])'


def moves_frozen(reading: AuditReading, row: LayerReading) -> str | None:
    """Tell why a layer's weights are not trained, if others are and its running statistics move all the same."""
    layer, trained = row.layer, trained_parameters(reading)
    weights = learned_weights(reading, row.name, layer)
    if not trained or not weights or isinstance(layer, FrozenBatchNorm) or layer.momentum == 0:
        return None
    if layer.running_mean is None or not layer.track_running_stats or is_averaged(reading, row.name):
        return None
    held = _held(reading, row, weights, trained)
    seen = _seen(reading, row)
    moved = None if seen is None else seen.forward_updates
    return held if (reading.model.training and layer.training if moved is None else moved > 0) else None


def _held(reading: AuditReading, row: LayerReading, weights: Sequence[Tensor], trained: set[int]) -> str | None:
    """Say what keeps a layer's weights as they are, or ``None`` if they are trained."""
    if not any(id(each) in trained for each in weights):
        if not any(each.requires_grad for each in weights):
            return "needs no gradient"
        given = {id(each) for every in reading.optimizers for group in every.param_groups for each in group["params"]}
        return "has a learning rate of 0" if any(id(each) in given for each in weights) else "has no optimizer"
    traffic, by_hand = reading.seen.traffic.get(row.name), reading.training and reading.training.manual_optimization
    if traffic is not None and not traffic.with_gradient and traffic.moving and not by_hand:
        return "runs under torch.no_grad()"
    return None


def _find_moving(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        held = moves_frozen(reading, row)
        if held is None:
            continue
        seen = _seen(reading, row)
        moved = None if seen is None else seen.forward_updates
        what = "its γ and β are" if affine_parameters(row.layer) else "it has no γ and β, and the weights around it are"
        yield rule.finding(
            row.name,
            f"{what} frozen ({held}), but its running statistics "
            + ("move with every batch, being in training mode" if moved is None else "moved while training")
            + ": frozen weights then meet other statistics, and training normalizes by the batch",
            {"momentum": row.layer.momentum, "forward_updates": moved},
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
        learns = any(id(each) in trained for each in learned_weights(reading, row.name, row.layer))
        found = (
            _in_training_mode(rule, reading, row)
            or _seen_in_validation(rule, _seen(reading, row), row)
            or (_seen_in_training(rule, _seen(reading, row), row) if learns else None)
            or (_seen_standing_still(rule, reading, row) if learns else None)
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
    if share is None or share >= 1 or isinstance(row.layer, FrozenBatchNorm):
        return None
    # With statistics that were learned before, this is a known way to fine-tune (norm_eval=True in mmdet).
    fresh = are_fresh(row.layer)
    return rule.finding(
        row.name,
        "it was in evaluation mode in every training batch though weights there are trained: its running statistics "
        "stay as they were " + ("at creation, (0, 1), " if fresh else "") + "while the weights before it change"
        if share == 0
        else f"it was in training mode in only {share:.0%} of the training batches",
        {"training_share": share, "fresh": int(fresh)},
        f"model.train() when training goes on after validation; if it is meant to be frozen, "
        f"{_FREEZE.format(name=row.name)}",
        severity="warning" if share or fresh else "info",
    )


def _seen_standing_still(rule: Rule, reading: AuditReading, row: LayerReading) -> Finding | None:
    seen = _seen(reading, row)
    if seen is None or seen.training_share != 1 or seen.forward_updates != 0 or seen.backward_updates:
        return None
    layer = row.layer
    # Another domain's counter is not watched, and a layer that does not run has nothing to count.
    if isinstance(layer, DomainBatchNorm) or layer.momentum == 0 or not may_move(reading, layer):
        return None
    if not _runs(reading, row):
        return None
    return rule.finding(
        row.name,
        "every training batch began with it in training mode, and none moved its running statistics: something calls "
        ".eval() inside the training step (or pauses its statistics), so that they stay as they were while the weights "
        "before it change",
        {"training_share": seen.training_share, "forward_updates": seen.forward_updates},
        f"no model.eval() in training_step; if it is meant to be frozen, {_FREEZE.format(name=row.name)}",
        severity="warning",
    )


def _runs(reading: AuditReading, row: LayerReading) -> bool:
    """Tell whether the layer is known to run in the network's forward pass."""
    if row.population is not None:
        return row.population.moments.count > 0
    return reading.record is not None and any(
        operation.layer is not None and row.name in operation.layer.owners("running_mean")
        for operation in reading.record.of_kind("batch_norm")
    )


def _in_evaluation_mode(rule: Rule, reading: AuditReading, row: LayerReading) -> Finding | None:
    if not is_frozen(reading, row.layer) or isinstance(row.layer, FrozenBatchNorm):
        return None
    return rule.finding(
        row.name,
        "it is in evaluation mode in a model that is in training mode, while weights there are trained; if that is "
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
        "γ and β, or without them the weights around the layer, are not trained, others are, and the running "
        "statistics move (any update, where training was watched)",
        _find_moving,
    ),
    Rule("untracked-freeze", "warning", "track_running_stats=False though running_mean is there", _find_untracked),
    Rule(
        "wrong-mode",
        "error",
        "training mode in a model in evaluation mode or in any validation batch (error); though its weights are "
        "trained, evaluation mode in some training batches, in all with fresh statistics, or no update in any "
        "(warning); evaluation mode in all training batches, or now (info)",
        _find_mode,
    ),
)
