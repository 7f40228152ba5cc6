"""What users of a model zoo trip over: statistics, eps and momentum."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bn_lightning.selection import describe, named_batch_norms
from bn_lightning.zoo.load_report import Remark
from bn_lightning.zoo.origin import Origin

__all__ = ["momentum_remarks", "origin_remarks", "statistics_remarks"]

# No network in use weighs the new batch with more (the same as the audit's momentum-convention).
_MOST_MOMENTUM = 0.5
_RECALIBRATE = "bn_lightning.recalibrate_batch_norm(model, batches) measures them"


def statistics_remarks(model: nn.Module, absent: Iterable[str] = ()) -> Iterator[Remark]:
    """Tell of running statistics that no training has made.

    Args:
        model: With its weights loaded.
        absent: Names of BatchNorm layers whose statistics the weights came without.
    """
    norms = named_batch_norms(model)
    absent = tuple(absent)
    if absent:
        yield Remark(
            "statistics",
            "warning",
            f"the file has no running statistics for {_of(absent, norms)}, and they are still the network's own; "
            f"evaluation normalizes by them. {_RECALIBRATE}",
            absent,
        )
    fresh = tuple(name for name, norm in norms.items() if name not in absent and _is_fresh(norm))
    if fresh:
        yield Remark(
            "statistics",
            "warning",
            f"the running statistics of {_of(fresh, norms)} are those of a new layer, mean 0 and variance 1, as if "
            f"lost on the way; evaluation normalizes by them. {_RECALIBRATE}",
            fresh,
        )


def momentum_remarks(model: nn.Module) -> Iterator[Remark]:
    """Tell of a momentum that weighs the old value in Keras, TensorFlow and JAX, and the new batch in torch."""
    norms = named_batch_norms(model)
    high = {name: norm for name, norm in norms.items() if norm.momentum is not None and norm.momentum > _MOST_MOMENTUM}
    if high:
        values = sorted({float(norm.momentum or 0) for norm in high.values()})
        meant = ", ".join(f"{value:g} for {round(1 - value, 12):g}" for value in values)
        yield Remark(
            "momentum",
            "warning",
            f"momentum={' and '.join(f'{value:g}' for value in values)} of {_of(tuple(high), norms)} weighs the new "
            "batch in torch, so that after any training the running statistics are little more than the last batch's; "
            f"it is Keras' convention, {meant}. Set each layer's momentum before training; evaluation does not use it.",
            tuple(high),
        )


def origin_remarks(model: nn.Module, origin: Origin) -> Iterator[Remark]:
    """Tell where BatchNorm layers have another eps or momentum than in the network that the weights are from."""
    norms = named_batch_norms(model)
    shared = {name: norm for name, norm in norms.items() if name in origin.settings}
    where = f"{origin.name!r}, which {origin.said_by} names as the network the weights are from"
    eps = tuple(name for name, norm in shared.items() if norm.eps != origin.settings[name].eps)
    if eps:
        yield Remark(
            "eps",
            "warning",
            f"eps is {norms[eps[0]].eps:g} in {_of(eps, norms)}, and {origin.settings[eps[0]].eps:g} in {where}: the "
            "outputs are others than there. Load the weights into that network, or set each layer's eps.",
            eps,
        )
    momentum = tuple(name for name, norm in shared.items() if norm.momentum != origin.settings[name].momentum)
    if momentum:
        ours, theirs = norms[momentum[0]].momentum, origin.settings[momentum[0]].momentum
        yield Remark(
            "momentum",
            "info",
            f"momentum, the weight of the new batch, is {ours} in {_of(momentum, norms)}, and {theirs} in {where}: "
            "further training moves the running statistics at another pace.",
            momentum,
        )


def _is_fresh(norm: _BatchNorm) -> bool:
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None or is_lazy(mean) or mean.is_meta:
        return False
    return bool(torch.all(mean == 0)) and bool(torch.all(var == 1))


def _of(names: tuple[str, ...], norms: dict[str, _BatchNorm]) -> str:
    if len(names) == len(norms) > 1:
        return f"all {len(norms)} BatchNorm layers"
    return f"{len(names)} of {len(norms)} BatchNorm layers ({describe({name: norms[name] for name in names})})"
