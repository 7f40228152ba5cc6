"""Running statistics that floating-point numbers or eps distort."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.rules.layers import are_fresh, is_frozen
from bn_lightning.auditing.rules.rule import Rule
from bn_lightning.auditing.rules.statistics import NOTEWORTHY_GAP

__all__ = ["RULES"]

_WIDE = (torch.float32, torch.float64)
# A variance of 10 eps is normalized to 0.95 standard deviations, one of eps to 0.71.
_TIMES_EPS = 10


def _find_low_precision(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    trains = reading.model.training or reading.training is not None or bool(reading.optimizers)
    for row in reading.layers:
        mean, var = row.layer.running_mean, row.layer.running_var
        narrow = [tensor.dtype for tensor in (mean, var) if tensor is not None and tensor.dtype not in _WIDE]
        if not narrow or mean is None or var is None:
            continue
        dtype = narrow[0]
        moving = trains and not is_frozen(reading, row.layer)
        stall = _stall(row, dtype)
        largest = float(var.max())
        harms = []
        if stall is not None:
            harms.append(
                f"with momentum={row.layer.momentum:g} a running mean stops up to {stall:.2g} of its own size away "
                "from what it should become, since smaller changes round to nothing"
            )
        if torch.finfo(dtype).max < 1e6:
            harms.append(f"a variance above {torch.finfo(dtype).max:g} becomes inf (the largest is {largest:.3g})")
        severe = moving or (row.gap is not None and row.gap >= NOTEWORTHY_GAP)
        yield rule.finding(
            row.name,
            f"its running statistics are kept in {_short(dtype)}: " + "; ".join(harms or ["they round"]),
            {
                "dtype": _short(dtype),
                "momentum": row.layer.momentum,
                "stall": stall,
                "largest_variance": largest,
                "gap": row.gap,
            },
            "keep the whole layer in float32: layer.float() for each BN layer, or precision='bf16-mixed' instead of "
            "'bf16-true'",
            severity="warning" if severe else "info",
        )


def _stall(row: LayerReading, dtype: torch.dtype) -> float | None:
    """How far a running mean can be from its goal and not move, relative to itself; momentum m weighs the new batch.

    A change of m·distance is lost if it is below half the spacing of numbers, which is up to eps/2 of the mean itself.
    """
    momentum = row.layer.momentum
    return torch.finfo(dtype).eps / 2 / momentum if momentum else None


def _find_tiny(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        var, eps = _variance(row), row.layer.eps
        if var is None:
            continue
        # A variance of 0 is a channel that never changes: it is at β whatever eps is.
        varying = var[torch.isfinite(var) & (var > 0)]
        tiny = int((varying < _TIMES_EPS * eps).sum())
        if not tiny:
            continue
        below = int((varying < eps).sum())
        decided = 2 * below > var.numel()
        yield rule.finding(
            row.name,
            f"{tiny} of {var.numel()} channels have a variance below {_TIMES_EPS}·eps"
            + (
                f", and {below} below eps: eps={eps:g} decides by how much the layer scales them, not the data"
                if decided
                else ""
            ),
            {
                "channels": tiny,
                "share": tiny / var.numel(),
                "share_below_eps": below / var.numel(),
                "eps": eps,
                "median_variance": float(varying.median()),
            },
            "rescale the input, or set the eps the weights were trained with (0.001 in TensorFlow, 1e-05 in torch)",
            severity="warning" if decided else "info",
        )


def _variance(row: LayerReading) -> Tensor | None:
    """Return the variance a layer normalizes by in training, (C,); the running one may hold some of the initial 1."""
    moments = None if row.population is None else row.population.moments
    if moments is not None and moments.count > 1:
        return moments.var(correction=1)
    return None if row.layer.running_var is None or are_fresh(row.layer) else row.layer.running_var.detach()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


RULES = (
    Rule(
        "low-precision-statistics",
        "warning",
        f"buffers neither float32 nor float64 (info: no training is known, and no gap ≥ {NOTEWORTHY_GAP} output std)",
        _find_low_precision,
    ),
    Rule(
        "tiny-variance",
        "warning",
        f"variance < {_TIMES_EPS}·eps in some channel (info), < eps in more than half of the channels (warning)",
        _find_tiny,
    ),
)
