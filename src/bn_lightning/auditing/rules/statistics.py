"""Running statistics that are missing, unusable or were never set."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.finding import Finding, Repair
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.rules.layers import are_fresh, fresh_half
from bn_lightning.auditing.rules.rule import RECALIBRATE, Rule
from bn_lightning.layers.frozen import FrozenBatchNorm

__all__ = ["NOTEWORTHY_GAP", "RULES"]

# Below this the difference drowns in the noise of an ordinary moving average.
NOTEWORTHY_GAP = 0.1


def _find_missing(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        if row.layer.running_mean is None or row.layer.running_var is None:
            yield rule.finding(
                row.name,
                "it has no running statistics: in evaluation it normalizes by the batch, so that an output depends on "
                "the examples it shares a batch with",
                {"track_running_stats": row.layer.track_running_stats},
                f"build the layer with track_running_stats=True, then {RECALIBRATE}",
            )


def _find_nonfinite(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        mean, var = row.layer.running_mean, row.layer.running_var
        if mean is None or var is None:
            continue
        buffers = _channels(~torch.isfinite(mean) | ~torch.isfinite(var) | (var < 0))
        moments = None if row.population is None else row.population.moments
        inputs = [] if moments is None else _channels(~torch.isfinite(moments.mean) | ~torch.isfinite(moments.m2))
        if inputs:
            yield rule.finding(
                row.name,
                f"its input holds nan or inf on the training data ({_named(inputs)})",
                {"input_channels": len(inputs), "running_channels": len(buffers)},
                "with bn_lightning.observe_activations(model) as activations: model(x); print(activations.table())",
            )
        elif buffers:
            first = buffers[0]
            yield rule.finding(
                row.name,
                f"its running statistics are nan, inf or negative in variance ({_named(buffers)}), though its input is "
                "finite: one bad batch is enough, and a moving average never forgets it",
                {
                    "running_channels": len(buffers),
                    "running_mean": float(mean[first]),
                    "running_var": float(var[first]),
                },
                RECALIBRATE,
                repair=Repair("recalibrate"),
            )


def _find_fresh(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        fresh, half = are_fresh(row.layer), fresh_half(row.layer)
        if isinstance(row.layer, FrozenBatchNorm) or not (fresh or half):
            continue
        if row.population is None:
            yield from _fresh_without_data(rule, reading, row) if fresh else ()
        elif row.gap is not None and row.gap >= NOTEWORTHY_GAP and not row.population.frozen:
            yield rule.finding(
                row.name,
                f"its running statistics are exactly (0, 1), as at creation, {_why_fresh(row.layer)}"
                if fresh
                else f"its {half} is as at creation in every channel, {'1' if half == 'running_var' else '0'}, and the "
                "other of its running statistics is not: one of the two was not loaded (strict=False?) or was reset",
                {"gap": row.gap, "num_batches_tracked": _updates(row.layer), "momentum": row.layer.momentum},
                f"load a checkpoint that has them, or {RECALIBRATE}",
                repair=Repair("recalibrate"),
            )


def _fresh_without_data(rule: Rule, reading: AuditReading, row: LayerReading) -> Iterator[Finding]:
    """Accuse only where it is sure: a β that differs between channels was trained, or the network began like that."""
    layer, updates = row.layer, _updates(row.layer)
    if updates:
        message = f"its running statistics are exactly (0, 1), as at creation, {_why_fresh(layer)}"
        severity = "warning" if reading.model.training else "error"
    elif layer.bias is not None and bool((layer.bias != layer.bias[:1]).any()):
        message = (
            "its running statistics are exactly (0, 1), as at creation, but its β is not 0: they were not loaded "
            "(strict=False?), or it was begun with a random β and never trained; give training batches to see"
        )
        severity = "info"
    else:
        return
    yield rule.finding(
        row.name,
        message,
        {"gap": None, "num_batches_tracked": updates, "momentum": layer.momentum},
        f"load a checkpoint that has them, or {RECALIBRATE}",
        severity=severity,
        repair=Repair("recalibrate"),
    )


def _updates(layer: _BatchNorm) -> int | None:
    return None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)


def _why_fresh(layer: _BatchNorm) -> str:
    updates = _updates(layer)
    if updates:
        return f"though num_batches_tracked is {updates}: momentum is 0, or they were reset or not loaded"
    return (
        "and num_batches_tracked says they were never updated: they were not loaded (strict=False?), or it was never "
        "in training mode"
    )


def _channels(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _named(channels: list[int]) -> str:
    names = ", ".join(map(str, channels[:3])) + (", …" if len(channels) > 3 else "")
    return f"{'channel' if len(channels) == 1 else f'{len(channels)} channels,'} {names}"


RULES = (
    Rule("nonfinite-statistics", "error", "any channel not finite, or of negative variance", _find_nonfinite),
    Rule(
        "fresh-statistics",
        "error",
        f"running_mean all 0, or running_var all 1, with a gap ≥ {NOTEWORTHY_GAP} output std; without data: both, and "
        "num_batches_tracked > 0 (error; in training mode a warning), or β not the same in all channels (info)",
        _find_fresh,
    ),
    Rule("no-statistics", "warning", "running_mean or running_var is None", _find_missing),
)
