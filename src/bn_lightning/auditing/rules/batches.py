"""Batches too small, of one value, in an order, or with padding."""

from collections.abc import Iterator

import torch

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.observers.calls import LayerCalls
from bn_lightning.auditing.reading import AuditReading, LayerReading
from bn_lightning.auditing.rules.layers import is_frozen
from bn_lightning.auditing.rules.rule import Rule
from bn_lightning.layers.cross_replica import CrossReplicaBatchNorm
from bn_lightning.layers.ghost import GhostBatchNorm
from bn_lightning.layers.masked import MaskedBatchNorm

__all__ = ["RULES"]

# So few values per channel put noise of 18 % and 25 % of σ into a mean.
_FEW_VALUES, _TOO_FEW_VALUES = 32, 16
# Variance of the batches' means, drawn at random, in σ²: with so much of it a batch tells of 20 values.
_NOISE = 0.05
# Of the F ratio of batches that are a random draw one in a million is above the bound, were all channels alike.
_NORMAL_QUANTILE, _LEAST_RATIO, _FEWEST_BATCHES = 4.75, 3.0, 4
_PADDED = 0.05
_LARGER = (
    "a larger batch per forward pass; SyncBatchNorm or bn_lightning.convert_batch_norm(model, "
    '"cross_replica") over processes; "group" or "renorm" in place of it; or FreezeBatchNorm at the end'
)


def _find_small(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for row in reading.layers:
        if is_frozen(reading, row.layer):
            continue
        found = _values(reading, row)
        if found is None:
            continue
        examples, values = found
        noise = _noise(reading.seen.calls.get(row.name), row, examples)
        if values >= _FEW_VALUES and not (noise is not None and noise > _NOISE):
            continue
        batch_size = _batch_size(reading, row)
        yield rule.finding(
            row.name,
            f"a batch of {examples:g} examples gives {values:g} values per channel to normalize by"
            + ("" if noise is None else f", and its means spread by {noise**0.5:.2g} σ from batch to batch")
            + ": training sees noise that evaluation does not"
            + _accumulated(reading, examples, batch_size),
            {"examples": examples, "values_per_channel": values, "noise_variance": noise},
            _LARGER,
            severity="warning" if values < _TOO_FEW_VALUES else "info",
        )


def _values(reading: AuditReading, row: LayerReading) -> tuple[float, float] | None:
    """Tell over how many examples and values per channel a layer normalizes, from the data or the settings."""
    calls = reading.seen.calls.get(row.name)
    examples = _batch_size(reading, row)
    if examples is None:
        return None
    if calls is not None:
        values = calls.typical_values
    else:
        each = _values_per_example(reading, row.name)
        if each is None:
            return None
        values = examples * each
    layer, factor = row.layer, 1.0
    if isinstance(layer, GhostBatchNorm):
        factor = min(1.0, layer.virtual_batch_size / examples)
    elif isinstance(layer, CrossReplicaBatchNorm | torch.nn.SyncBatchNorm):
        factor = float(_processes(reading))
    return examples * factor, values * factor


def _batch_size(reading: AuditReading, row: LayerReading) -> float | None:
    """Tell how many examples one process gives a layer in one forward pass."""
    calls = reading.seen.calls.get(row.name)
    if calls is not None:
        return calls.typical_examples
    known = None if reading.training is None else reading.training.batch_size
    return None if known is None else float(known)


def _processes(reading: AuditReading) -> int:
    """Count those that train together; if that is unknown, those that audit together."""
    return reading.processes if reading.training is None else reading.training.processes


def _values_per_example(reading: AuditReading, name: str) -> int | None:
    """Count the values per channel that one example gives a layer, in the recorded pass."""
    if reading.record is None:
        return None
    for operation in reading.record.of_kind("batch_norm"):
        layer = operation.layer
        if layer is not None and layer.input is not None and name in layer.owners("running_mean"):
            shape = reading.record.values[layer.input].shape
            return max(1, int(torch.Size(shape[2:]).numel()))
    return None


def _noise(calls: LayerCalls | None, row: LayerReading, examples: float) -> float | None:
    if calls is None or row.population is None or not calls.by_example or row.population.moments.count < 2:
        return None
    var = row.population.moments.var(correction=0).cpu().double() + row.layer.eps
    share = calls.within / examples / var
    share = share[torch.isfinite(share)]
    return float(share.mean()) if len(share) else None


def _accumulated(reading: AuditReading, examples: float, batch_size: float | None) -> str:
    training = reading.training
    if training is None or batch_size is None or training.accumulate_grad_batches <= 1:
        return ""
    number, processes = training.accumulate_grad_batches, training.processes
    return (
        f". The true batch of BatchNorm is {examples:g} examples, though an optimizer step sees "
        f"{batch_size * number * processes:g} (accumulate_grad_batches={number}"
        + (f" in {processes} processes)" if processes > 1 else ")")
    )


def _find_single(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    told = {error.layer: error for error in reading.single_values}
    for name, error in told.items():
        number = sum(each.layer == name for each in reading.single_values)
        yield rule.finding(
            name,
            f"{number} of the batches gave it an input of shape {error.shape}, one value per channel, which has no "
            "variance: training stops with an error there. The audit has left these batches out",
            {"batches": number, "shape": str(error.shape)},
            "drop_last=True in the DataLoader, or a batch size that leaves no single example over",
        )
    if told or reading.last_batch != 1:
        return
    for row in reading.layers:
        calls = reading.seen.calls.get(row.name)
        one = _values_per_example(reading, row.name) == 1 if calls is None else calls.values == calls.examples
        if one and not is_frozen(reading, row.layer):
            yield rule.finding(
                row.name,
                "the last training batch of an epoch has one example, which gives it one value per channel: training "
                "stops with an error there",
                {"last_batch": 1},
                "drop_last=True in the DataLoader, or a batch size that leaves no single example over",
            )


def _find_ordered(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    ratios = {
        name: ratio
        for name, calls in reading.seen.calls.items()
        if calls.by_example and len(calls.examples) >= _FEWEST_BATCHES and (ratio := _ratio(calls)) is not None
    }
    if not ratios:
        return
    name = max(ratios, key=lambda each: ratios[each])
    calls, ratio = reading.seen.calls[name], ratios[name]
    batches = len(calls.examples)
    bound = max(_LEAST_RATIO, _chance(batches - 1, sum(calls.examples) - batches))
    if ratio <= bound:
        return
    again = _autocorrelation(calls)
    yield rule.finding(
        name,
        f"the batches are no random draw: their means vary {ratio:.3g} times as much as the examples within them "
        "explain. What a batch has in common is normalized away in training, and not in evaluation",
        {"variance_ratio": ratio, "bound": bound, "autocorrelation": again, "batches": batches},
        "shuffle=True in the training DataLoader, so that each batch mixes classes and domains. If a sampler puts "
        "together what belongs together on purpose, as metric learning does (P classes × K examples), keep it, with "
        "more classes a batch, and recalibrate over shuffled batches: "
        "bn_lightning.recalibrate_batch_norm(model, shuffled_batches)",
    )


def _ratio(calls: LayerCalls) -> float | None:
    """Average F over channels: variance between the batches' means against what that within them makes expect."""
    known = torch.isfinite(calls.within) & (calls.within > 1e-12 * (1 + calls.mean.square()))
    if not bool(known.any()):
        return None
    return float((calls.between[known] / calls.within[known]).mean())


def _chance(between: int, within: int) -> float:
    """Approximate what F of so many degrees of freedom exceeds about once in a million times.

    Reference:
        Wilson & Hilferty, PNAS 17(12), 1931: the cube root of χ²/n is nearly normal, with variance 2/(9n).
    """
    above, below = 2 / (9 * between), 2 / (9 * within)
    variance = (1 - above + _NORMAL_QUANTILE * above**0.5) ** 3
    # Both extremes do not come together: half of the normal quantile is about right for what is divided by.
    return float(variance / max(1 - below - _NORMAL_QUANTILE / 2 * below**0.5, 0.1) ** 3)


def _autocorrelation(calls: LayerCalls) -> float | None:
    """Average over channels of the correlation of a batch's mean with the next one's."""
    deviations = calls.means - calls.means.mean(0)
    squares = deviations.square().sum(0)
    found = ((deviations[1:] * deviations[:-1]).sum(0) / squares)[squares > 0]
    return float(found.mean()) if len(found) else None


def _find_padding(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    layers = {row.name: row.layer for row in reading.layers}
    for name, padding in reading.seen.padding.items():
        if isinstance(layers[name], MaskedBatchNorm) or padding.share < _PADDED:
            continue
        # Rows that merely recur do not follow one another more often than their share.
        if padding.longest <= padding.shortest or padding.persistence <= (1 + padding.share) / 2:
            continue
        yield rule.finding(
            name,
            f"{padding.share:.0%} of the positions it takes statistics of repeat one vector up to the end of the "
            f"sequence, for {padding.shortest} to {padding.longest} positions: that is padding, and how much of it a "
            "batch has moves its mean and variance",
            {"share": padding.share, "shortest": padding.shortest, "longest": padding.longest},
            f'bn_lightning.convert_batch_norm(model, "masked", include=[{name!r}]), and tell it the valid positions',
        )


RULES = (
    Rule(
        "small-batch",
        "warning",
        f"fewer than {_TOO_FEW_VALUES} values per channel in the typical batch (warning), than {_FEW_VALUES} (info); "
        f"variance of batch means > {_NOISE:g} σ² (info)",
        _find_small,
        ("data", "training"),
    ),
    Rule(
        "single-value-batch",
        "error",
        "any batch with one value per channel, or such a last one by its loader",
        _find_single,
        ("data", "training"),
    ),
    Rule(
        "ordered-batches",
        "warning",
        f"variance between batches over that expected > {_LEAST_RATIO:g} and beyond what one in a million random draws "
        f"has, in {_FEWEST_BATCHES} batches or more",
        _find_ordered,
        ("data",),
    ),
    Rule(
        "padding",
        "warning",
        f"≥ {_PADDED:.0%} of the positions repeat one vector to the end of sequences, more in some than in others; of "
        "inputs (N, C, L) and (N·L, C), not of pictures",
        _find_padding,
        ("data",),
    ),
)
