"""Running statistics that are missing, unusable or were never set."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.reading import AuditReading
from bn_lightning.auditing.rules.rule import RECALIBRATE, Rule

__all__ = ["NOTEWORTHY_GAP", "RULES", "are_fresh"]

# Below this the difference drowns in the noise of an ordinary moving average.
NOTEWORTHY_GAP = 0.1


def are_fresh(layer: _BatchNorm) -> bool:
    """Tell whether the running statistics are exactly (0, 1), as they are before the first update."""
    mean, var = layer.running_mean, layer.running_var
    return mean is not None and var is not None and bool((mean == 0).all()) and bool((var == 1).all())


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
        moments = row.population.moments
        buffers = _channels(~torch.isfinite(mean) | ~torch.isfinite(var) | (var < 0))
        inputs = _channels(~torch.isfinite(moments.mean) | ~torch.isfinite(moments.m2))
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
            )


def _find_fresh(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        if row.gap is None or row.population.frozen or not are_fresh(row.layer) or not row.gap >= NOTEWORTHY_GAP:
            continue
        count = row.layer.num_batches_tracked
        updates = None if count is None else int(count)
        cause = (
            "and num_batches_tracked says they were never updated: they were not loaded (strict=False?), or it was "
            "never in training mode"
            if not updates
            else f"though num_batches_tracked is {updates}: momentum is 0, or they were reset or not loaded"
        )
        yield rule.finding(
            row.name,
            f"its running statistics are exactly (0, 1), as at creation, {cause}",
            {"gap": row.gap, "num_batches_tracked": updates, "momentum": row.layer.momentum},
            f"load a checkpoint that has them, or {RECALIBRATE}",
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
        f"running_mean all 0 and running_var all 1, with a gap ≥ {NOTEWORTHY_GAP} output std",
        _find_fresh,
    ),
    Rule("no-statistics", "warning", "running_mean or running_var is None", _find_missing),
)
