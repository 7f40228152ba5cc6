"""Layers that run more often in a training step than once."""

from collections.abc import Iterator

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.reading import AuditReading
from bn_lightning.auditing.rules.layers import affine_parameters, is_frozen, may_move, trained_parameters
from bn_lightning.auditing.rules.rule import Rule
from bn_lightning.functional import ChannelMoments, channel_gap, layer_gap

__all__ = ["RULES"]

_DISTANCE = 0.25
# Calls a batch; below it a few odd batches explain it.
_MORE = 0.05
_PAUSE = "with bn_lightning.paused_statistics(model): around the extra forward pass"


def _find_shared(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        calls = reading.seen.calls.get(row.name)
        if calls is None or len(calls.each) < 2 or row.population is None or is_frozen(reading, row.layer):
            continue
        pooled = row.population.moments
        if pooled.count < 2:
            continue
        distance = max(_gap(each, pooled, row.layer.eps) for each in calls.each)
        far = distance >= _DISTANCE
        yield rule.finding(
            row.name,
            f"it runs {calls.per_batch} times a batch, and "
            + (
                f"one of the inputs it is given is {distance:.2g} standard deviations from all of them together: "
                "training normalizes each by itself, evaluation by the mixture"
                if far
                else "is given much the same each time"
            ),
            {"calls": calls.per_batch, "distance": distance},
            'a BatchNorm for each of the inputs (bn_lightning.convert_batch_norm(model, "domain") with use_domain), or '
            "one forward pass over all of them together",
            severity="warning" if far else "info",
        )


def _gap(one: ChannelMoments, pooled: ChannelMoments, eps: float) -> float:
    mean, var = pooled.mean.cpu().double(), pooled.var(correction=0).cpu().double()
    return float(layer_gap(channel_gap(mean, var, one.mean, one.var(correction=0), eps), None))


def _find_extra(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    trained = trained_parameters(reading)
    for row in reading.layers:
        if not may_move(reading, row.layer) or row.layer.momentum == 0:
            continue
        affine = affine_parameters(row.layer)
        if affine and trained and not any(id(parameter) in trained for parameter in affine):
            continue  # frozen-weights-moving-statistics tells it
        traffic = reading.seen.traffic.get(row.name)
        seen = None if reading.history is None else reading.history.layers.get(row.name)
        updates = None if seen is None else seen.forward_updates
        if seen is not None and seen.between_updates:
            yield _between(rule, row.name, seen.between_updates)
        elif traffic is None:
            if updates is not None and updates - _recorded_calls(reading, row.name) > _MORE:
                yield _perhaps_extra(rule, row.name, updates)
        else:
            expected = traffic.with_gradient
            extra = min(traffic.without_gradient, traffic.moving - expected)
            if updates is not None:
                extra = max(extra, updates - max(expected, _recorded_calls(reading, row.name)))
            if extra > _MORE:
                yield rule.finding(
                    row.name,
                    f"its running statistics are moved {extra:.2g} times a training batch beside the {expected:g} "
                    "forward pass(es) that training needs: an extra pass in training mode, which moves them even "
                    "under torch.no_grad()",
                    {"extra_updates": extra, "updates": updates, "with_gradient": expected},
                    f"{_PAUSE}; or run it in evaluation mode",
                )


def _between(rule: Rule, name: str, updates: int) -> Finding:
    return rule.finding(
        name,
        f"its running statistics are moved between training batches, {updates} times outside of validation: a forward "
        "pass in training mode that nothing is trained by, such as a picture that is logged",
        {"between_updates": updates},
        f"{_PAUSE}; or run it in evaluation mode",
    )


def _perhaps_extra(rule: Rule, name: str, updates: float) -> Finding:
    """Without having read a loss: two views, or a network and its adversary, are run more than once and meant so."""
    return rule.finding(
        name,
        f"its running statistics are moved {updates:.2g} times a training batch; which of these forward passes "
        "training needs cannot be told, since no loss was read",
        {"updates": updates},
        f"step= has it told; if one of them is not trained by, {_PAUSE}",
        severity="info",
    )


def _recorded_calls(reading: AuditReading, name: str) -> int:
    """How often one forward pass runs a layer; 1 if that was not recorded."""
    if reading.record is None:
        return 1
    passes = 1 + max((operation.call for operation in reading.record.operations), default=0)
    calls = sum(
        operation.layer is not None and name in operation.layer.owners("running_mean")
        for operation in reading.record.of_kind("batch_norm")
    )
    return max(1, calls // passes)


def _find_recomputed(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        if not may_move(reading, row.layer):
            continue
        seen = None if reading.history is None else reading.history.layers.get(row.name)
        traffic = reading.seen.traffic.get(row.name)
        watched = None if seen is None else seen.backward_updates
        again = watched if watched is not None else 0.0 if traffic is None else traffic.recomputed
        if again <= _MORE:
            continue
        momentum = row.layer.momentum
        same = "" if momentum is None else f", or momentum={1 - (1 - momentum) ** 0.5:.3g}, which twice is {momentum:g}"
        yield rule.finding(
            row.name,
            f"activation checkpointing runs it again in the backward pass, {again:.2g} times a batch: its running "
            "statistics take every batch in twice, as with almost twice the momentum",
            {"backward_updates": again, "momentum": momentum},
            "checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), "
            f"bn_lightning.paused_statistics(block))){same}",
        )


RULES = (
    Rule(
        "shared-layer",
        "warning",
        f"several calls a batch: one input ≥ {_DISTANCE:g} output std from all together (warning), or alike (info)",
        _find_shared,
        ("data",),
    ),
    Rule(
        "extra-forward",
        "warning",
        f"> {_MORE:g} updates a training batch more than forward passes with gradient, or any between batches "
        "(warning); more than one forward pass makes, where no loss was read (info)",
        _find_extra,
        ("losses", "history"),
    ),
    Rule(
        "checkpoint-recompute",
        "warning",
        f"> {_MORE:g} calls or updates a batch during the backward pass",
        _find_recomputed,
        ("losses", "history"),
    ),
)
