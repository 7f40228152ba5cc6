"""Write population statistics into the running statistics."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import RecalibrationError
from bn_lightning.functional import channel_gap, layer_gap
from bn_lightning.recalibration.batches import Forward
from bn_lightning.recalibration.population import LayerPopulation, measure_population
from bn_lightning.recalibration.random_draw import AUTO, tolerance_for
from bn_lightning.recalibration.result import (
    RecalibratedLayer,
    RecalibrationResult,
    batches_named,
    write_statistics,
)
from bn_lightning.selection import named_batch_norms, unwrap

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

__all__ = ["recalibrate_batch_norm"]


def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int = 200,
    forward: Forward | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    tolerance: float | str | None = AUTO,
    process_group: "ProcessGroup | None" = None,
    show_progress: bool = True,
) -> RecalibrationResult:
    """Replace running statistics by population statistics, in place ("precise BN").

    ``running_mean`` becomes the mean over all values, ``running_var`` their variance with correction=1, which is both
    Algorithm 2's and torch's own convention. ``num_batches_tracked`` goes on counting training batches, untouched.
    Arguments, and which layers count as frozen, are as in `population_statistics`; a layer that is frozen or never
    ran is left as it was and is a row with that reason. Either all layers are written or none.

    A loader that shuffles is drawn from until every layer's mean and standard deviation has an estimated standard error
    below 1 % of σ, 20 batches at least. An estimate from what was drawn is no bound, and of batches that come in an
    order it says nothing, so that any other loader, a list or a generator is read up to ``max_batches``, and so is
    everything with ``tolerance=None``; a number is your word that the order is random. Where ``torch.distributed`` is
    initialized, every process has to call this with its own share of the data, and all get the same statistics, those
    of all data.

    Raises:
        RecalibrationError: As `population_statistics`, and if a selected layer has no running statistics to write to,
            or if population statistics are not finite in the buffers' dtype.
        BatchNormError: If a pattern matches no BN layer.

    Example:
        >>> bn = nn.BatchNorm1d(1)
        >>> result = recalibrate_batch_norm(bn, [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]] * 3)])
        >>> bn.running_mean, bn.running_var
        (tensor([5.6000]), tensor([11.3000]))
        >>> result.undo()
        >>> bn.running_mean
        tensor([0.])

    Reference:
        Ioffe & Szegedy, arXiv:1502.03167, Alg. 2; Wu & Johnson, arXiv:2105.07576, §3.
    """
    measured = measure_population(
        model,
        batches,
        max_batches=max_batches,
        forward=forward,
        include=include,
        exclude=exclude,
        tolerance=tolerance_for(batches, tolerance),
        process_group=process_group,
        show_progress=show_progress,
        check=_require_running_statistics,
    )
    layers = named_batch_norms(unwrap(model), include, exclude)
    rows, planned, before = [], [], []
    for name, population in measured.layers.items():
        layer, moments = layers[name], population.moments
        assert layer.running_mean is not None
        assert layer.running_var is not None
        reason, gap = _reason_to_leave(population), None
        if moments.count > 1 and population.unlike is None:
            mean, var = moments.mean, moments.var(correction=1)
            channels = channel_gap(layer.running_mean.to(mean), layer.running_var.to(mean), mean, var, layer.eps)
            gap = float(layer_gap(channels, None if layer.weight is None else layer.weight.detach()))
            if reason is None:
                planned.append((layer, _finite(name, mean, layer.running_mean), _finite(name, var, layer.running_var)))
                before.append((layer, layer.running_mean.clone(), layer.running_var.clone()))
        rows.append(RecalibratedLayer(name, moments.count, gap, reason, population.standard_error))
    result = RecalibrationResult(tuple(rows), measured.batches, tuple(before), measured.stopped_early)
    try:
        for layer, mean, var in planned:
            write_statistics(layer, mean, var)
    except BaseException:
        result.undo()
        raise
    return result


def _require_running_statistics(layers: Mapping[str, _BatchNorm]) -> None:
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise RecalibrationError(
                f"{name!r} ({type(layer).__name__}) has no running statistics to recalibrate "
                f"(track_running_stats={layer.track_running_stats}): it normalizes by the batch in evaluation too. "
                f"Leave it out with exclude=({name!r},), or build it with track_running_stats=True."
            )


def _reason_to_leave(population: LayerPopulation) -> str | None:
    if population.moments.count == 0:
        return f"never reached in {batches_named(population.batches)}"
    if population.frozen:
        return "frozen: it trains on its running statistics; call model.eval() first to include it"
    return population.unlike


def _finite(name: str, value: Tensor, buffer: Tensor) -> Tensor:
    """Cast to the buffer's dtype, refusing what would not be finite there."""
    cast = value.to(buffer.dtype)
    bad = (~torch.isfinite(cast)).nonzero().flatten().tolist()
    if bad:
        raise RecalibrationError(
            f"population statistics of {name!r} are not finite in {len(bad)} of {cast.numel()} channels "
            f"(channel {bad[0]}: {float(value[bad[0]])} as {buffer.dtype}). Nothing was written. Look for the first "
            f"layer with non-finite activations (bn_lightning.observe_activations), or leave it out with exclude=."
        )
    return cast
