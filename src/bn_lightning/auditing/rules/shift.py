"""Inputs that differ: between training and evaluation, or from channel to channel."""

from collections.abc import Iterator

import torch

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.rules.rule import Rule
from bn_lightning.functional import channel_gap, layer_gap

__all__ = ["RULES"]

# Of a BN's output, in standard deviations, and in standard errors of so many examples.
_SHIFT, _ERRORS = 0.25, 4.0
# Of the recalibrated loss, what the evaluation inputs' own statistics save where their difference is no trifle.
_COST = 0.1
# Between scales; of many the extremes are left out, unless one is so many times the median. And of a mean, in standard
# deviations.
_RATIO, _MANY, _ALONE, _FAR = 10.0, 10, 100.0, 10.0


def _find_shift(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    rows = {row.name: row for row in reading.layers}
    in_order = [rows[name] for name in reading.seen.calls if name in reading.evaluation and name in rows]
    loss = None if reading.losses is None else reading.losses.difference("domain shift")
    costs = "" if loss is None else f"; statistics of the evaluation inputs would change the loss by {-loss.mean:+.3g}"
    # Deeper layers differ also because a network knows what it was trained on: only where that is what it costs.
    for place, row in enumerate(in_order if _is_costly(reading) else in_order[:1]):
        found = _distance(reading, row)
        if found is None:
            continue
        gap, error = found
        if not gap >= _SHIFT or (gap < _ERRORS * error if error is not None else place > 0):
            continue
        yield rule.finding(
            row.name,
            f"the evaluation inputs differ from the training inputs: at {'this' if place else 'the first'} BatchNorm "
            f"by {gap:.2g} standard deviations of its output{costs}",
            {"gap": gap, "standard_error": error, "domain_shift": None if loss is None else loss.mean},
            "give both the same preprocessing (normalization, channel order, orientation, resizing); if the domain is "
            'meant to differ, bn_lightning.convert_batch_norm(model, "adaptive") or "domain"',
        )
        return


def _is_costly(reading: AuditReading) -> bool:
    """Tell whether the evaluation inputs' own statistics make the loss evidently and considerably smaller."""
    if reading.losses is None:
        return False
    loss = reading.losses.difference("domain shift")
    return loss is not None and loss.is_evident and loss.mean >= _COST * abs(reading.losses.recalibrated.mean)


def _distance(reading: AuditReading, row: LayerReading) -> tuple[float, float | None] | None:
    """Give the gap between training and evaluation at a layer, and its standard error if that is known.

    Of means and variances together, unless the means alone are surer: heavy tails blur a variance far more than a mean.
    """
    if row.population is None:
        return None
    train, evaluation = row.population.moments, reading.evaluation[row.name].moments
    if train.count < 2 or evaluation.count < 2:
        return None
    eps, var, other = row.layer.eps, train.var(correction=1), evaluation.var(correction=1)
    both = float(layer_gap(channel_gap(train.mean, var, evaluation.mean, other, eps), None))
    of_means, error = _standard_errors(reading, row.name, var.cpu().double() + eps, other.cpu().double() + eps)
    if of_means is None or error is None:
        return both, None
    means = float(layer_gap(channel_gap(train.mean, var, evaluation.mean, var, eps), None))
    if means >= _SHIFT and means * error > both * of_means:
        return means, of_means
    return both, error


def _standard_errors(
    reading: AuditReading, name: str, var: torch.Tensor, other: torch.Tensor
) -> tuple[float | None, float | None]:
    """How far apart two random draws of so many examples lie, RMS over channels, in σ: their means, and in all.

    Means differ by their standard errors. A ratio r of standard deviations has, to first order, the variance r²/4 times
    the squared relative errors of both variances, which heavy tails make large, and 1/4 of that where both draws are
    alike (r = 1): r/4 is taken, between the two.
    """
    calls, others = reading.seen.calls.get(name), reading.seen.evaluation_calls.get(name)
    if calls is None or others is None or not (calls.by_example and others.by_example):
        return None, None
    means = (calls.variance_of_mean + others.variance_of_mean) / var
    relative = calls.variance_of_variance / var.square() + others.variance_of_variance / other.square()
    return _root_mean(means), _root_mean(means + (other / var).sqrt() / 4 * relative)


def _root_mean(squares: torch.Tensor) -> float | None:
    known = squares[torch.isfinite(squares)]
    return float(known.mean().sqrt()) if len(known) else None


def _find_scales(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    first = reading.seen.first_input
    if first is None:
        return
    varying = (first.range > 0) & (first.std > 0)
    if not bool(varying.any()):
        return
    names, std, values = varying.nonzero().flatten(), first.std[varying], first.range[varying]
    singular = first.kind.removesuffix("s")
    fix = f"standardize the inputs over the training set, or put a BatchNorm before {first.layer!r}"
    # By both: a pixel at the edge hardly varies and a rare word hardly occurs, and neither is in other units.
    ratio, above = min(_ratio(std), _ratio(values)), torch.minimum(std / std.median(), values / values.median())
    alone = float(above.max())
    if ratio > _RATIO or alone > _ALONE:
        low, high = int(values.argmin()), int(values.argmax())
        if ratio <= _RATIO:
            ratio, low, high = alone, int((values - values.median()).abs().argmin()), int(above.argmax())
        yield rule.finding(
            None,
            f"the {first.kind} of the network's input, at {first.layer!r}, are of very different scale: standard "
            f"deviation {float(std[low]):.3g} in {singular} {int(names[low])}, {float(std[high]):.3g} in {singular} "
            f"{int(names[high])}, and no normalization comes before",
            {"ratio": ratio, "smallest": float(std[low]), "largest": float(std[high])},
            fix,
        )
        return
    offset = float((first.mean[varying].abs() / std).median())
    if offset > _FAR:
        yield rule.finding(
            None,
            f"the {first.kind} of the network's input, at {first.layer!r}, are {offset:.2g} standard deviations from 0 "
            "in the median: what varies in them is small beside what does not, and no normalization comes before",
            {"offset": offset},
            fix,
        )


def _ratio(scales: torch.Tensor) -> float:
    """Divide the largest by the smallest; of many the 90th percentile by the 10th."""
    ends = (0.1, 0.9) if len(scales) >= _MANY else (0.0, 1.0)
    low, high = torch.quantile(scales, torch.tensor(ends, dtype=scales.dtype), interpolation="nearest").tolist()
    return float(high / low)


RULES = (
    Rule(
        "evaluation-shift",
        "warning",
        f"training against evaluation inputs ≥ {_SHIFT:g} output std and ≥ {_ERRORS:g} standard errors at the first "
        f"BN; at any, where their own statistics evidently save ≥ {_COST:.0%} of the loss",
        _find_shift,
        ("evaluation",),
    ),
    Rule(
        "unstandardized-input",
        "warning",
        f"standard deviations and ranges of input channels or features both > {_RATIO:g} times apart (of {_MANY} or "
        f"more, the 90th percentile over the 10th, or one > {_ALONE:g} times the median), or the median mean > "
        f"{_FAR:g} standard deviations from 0",
        _find_scales,
        ("data",),
    ),
)
