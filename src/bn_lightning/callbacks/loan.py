"""Running statistics that validation gets in place of training's own, until training goes on."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.recalibration.result import write_statistics
from bn_lightning.selection import named_batch_norms

__all__ = ["Statistics", "StatisticsLoan", "copied_statistics", "trains", "write_all"]

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Layer name to running mean and variance."""


class StatisticsLoan:
    """What training goes on from, while the network holds something else.

    Only a layer that still holds what it was lent gets its own back: a callback that swaps weights has then put
    another network's in its place, and that is nobody's to overwrite. A layer that was frozen meanwhile stays as it was
    frozen.
    """

    def __init__(self) -> None:
        self._own: Statistics = {}
        self._lent: Statistics | None = {}  # None: whatever a checkpoint held

    def lend(self, own: Statistics, lent: Statistics) -> None:
        """Remember both; where ``own`` is what an earlier loan lent, it is that loan's own that goes back."""
        self._own = {**own, **self.outstanding(own)}
        self._lent = lent

    def outstanding(self, held: Statistics) -> Statistics:
        """Pick training's own statistics of the layers that still hold what they were lent."""
        if self._lent is None:
            return self._own
        return {name: own for name, own in self._own.items() if name in held and _same(held[name], self._lent[name])}

    def settle(self, module: nn.Module) -> None:
        """Let training go on with its own."""
        if not self._own:
            return
        layers = {name: layer for name, layer in named_batch_norms(module).items() if trains(layer)}
        write_all(layers, self.outstanding(_held(named_batch_norms(module))))
        self._own, self._lent = {}, {}

    def state(self, module: nn.Module | None) -> dict[str, list[Tensor]]:
        """Return what is outstanding, on the CPU."""
        found = {} if module is None else self.outstanding(_held(named_batch_norms(module)))
        return {name: [tensor.cpu() for tensor in pair] for name, pair in found.items()}

    def resume(self, state: dict[str, Iterable[Tensor]]) -> None:
        """Take up a loan from a checkpoint that holds what was lent."""
        self._own = {name: (mean, var) for name, (mean, var) in state.items()}
        self._lent = None


def trains(layer: _BatchNorm) -> bool:
    """Tell, in training, whether a layer normalizes by the batch."""
    return layer.training and not isinstance(layer, FrozenBatchNorm)


def copied_statistics(module: nn.Module, include: Iterable[str], exclude: Iterable[str]) -> Statistics:
    """Return copies of the selected layers' statistics."""
    picked = named_batch_norms(module, include, exclude)
    return {name: (mean.clone(), var.clone()) for name, (mean, var) in _held(picked).items()}


def write_all(layers: dict[str, _BatchNorm], statistics: Statistics) -> None:
    """Write statistics into those of the layers that have any, in place."""
    for name, (mean, var) in statistics.items():
        layer = layers.get(name)
        if layer is not None and layer.running_mean is not None:
            write_statistics(layer, mean, var)


def _held(layers: dict[str, _BatchNorm]) -> Statistics:
    """Return the very buffers of the layers that have them."""
    return {
        name: (layer.running_mean, layer.running_var)
        for name, layer in layers.items()
        if layer.running_mean is not None and layer.running_var is not None
    }


def _same(held: tuple[Tensor, Tensor], lent: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(one, other.to(one.device)) for one, other in zip(held, lent, strict=True))
