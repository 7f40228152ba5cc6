"""Layers that run more often in a training step than once."""

from collections.abc import Iterator

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.reading import AuditReading
from bn_lightning.auditing.rules.freezing import moves_frozen
from bn_lightning.auditing.rules.layers import is_averaged, is_frozen, may_move
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
    for row in reading.layers:
        if not may_move(reading, row.layer) or row.layer.momentum == 0:
            continue
        # Of a layer with frozen weights it is not how often that is wrong, but that its statistics move at all.
        if moves_frozen(reading, row) or is_averaged(reading, row.name):
            continue
        traffic = reading.seen.traffic.get(row.name)
        seen = None if reading.history is None else reading.history.layers.get(row.name)
        if seen is not None and seen.between_updates:
            yield rule.finding(
                row.name,
                f"its running statistics were moved {seen.between_updates} times between training batches, outside of "
                "validation: a forward pass in training mode, in a hook or a callback, which moves them even under "
                "torch.no_grad()",
                {"between_updates": seen.between_updates},
                f"{_PAUSE}; or run it in evaluation mode",
            )
        updates = None if seen is None else seen.forward_updates
        needed = max(0.0 if traffic is None else traffic.with_gradient, float(_recorded_calls(reading, row.name)))
        more = 0.0 if updates is None else updates - needed
        if traffic is not None:
            shown = min(traffic.without_gradient, traffic.moving - traffic.with_gradient)
            # By hand, training_step may learn from more forward passes than the step that was read in its place.
            extra = shown if _by_hand(reading) else max(shown, more)
            if extra > _MORE:
                yield rule.finding(
                    row.name,
                    f"its running statistics are moved {extra:.2g} times a training batch beside the "
                    f"{traffic.with_gradient:g} forward pass(es) that training needs: an extra pass in training mode, "
                    "which moves them even under torch.no_grad()",
                    {"extra_updates": extra, "updates": updates, "with_gradient": traffic.with_gradient},
                    f"{_PAUSE}; or run it in evaluation mode",
                )
                continue
        if more > _MORE:
            yield rule.finding(
                row.name,
                f"its running statistics are moved {updates:.3g} times a training batch, where one forward pass "
                f"moves them {needed:g} times; whether training learns from all of these passes cannot be told "
                + ("without a loss reading" if traffic is None else "from the one step whose loss was read"),
                {"extra_updates": more, "updates": updates, "one_pass": needed},
                "step=lambda module, batch: …, which makes all forward passes of a training batch and returns a loss "
                "from them, shows which are without gradient (audit_batch_norm, BatchNormAudit); such a pass belongs "
                "under bn_lightning.paused_statistics(model), one that training learns from does not",
                severity="info",
            )


def _by_hand(reading: AuditReading) -> bool:
    return reading.training is not None and reading.training.manual_optimization


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
        "(warning); than one forward pass has, where no loss reading tells which passes have a gradient (info)",
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
