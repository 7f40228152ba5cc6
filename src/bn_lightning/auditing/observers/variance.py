"""The variance of layers' inputs with dropout at work."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.exchange import from_everyone
from bn_lightning.auditing.observer import Observer, each_input
from bn_lightning.functional import ChannelMoments, batch_moments
from bn_lightning.recalibration import LayerPopulation

__all__ = ["TrainingVarianceObserver"]


class TrainingVarianceObserver(Observer):
    """Measures the variance of every layer's input while all of the network is in training mode."""

    passes: ClassVar[tuple[str, ...]] = ("full_training",)

    def __init__(self) -> None:
        self._seen: dict[str, ChannelMoments] = {}
        self._pending: list[tuple[str, ChannelMoments]] = []

    def watching(self, network: nn.Module, layers: Mapping[str, _BatchNorm], name: str) -> AbstractContextManager[None]:
        """Watch one pass."""
        return each_input(layers, lambda name, layer, x: self._pending.append((name, batch_moments(x))))

    def begin_batch(self) -> None:
        """Forget a batch that failed."""
        self._pending = []

    def end_batch(self) -> None:
        """Keep the batch."""
        for name, moments in self._pending:
            self._seen[name] = self._seen[name].merge(moments) if name in self._seen else moments
        self._pending = []

    def ratios(self, same_batches: Mapping[str, LayerPopulation]) -> dict[str, float]:
        """Compare with the same batches without dropout: the ratio of variances, geometric mean over channels.

        Channels that are constant in either are left out; a layer without any other is too. Several processes compare
        the batches of all with the batches of all.
        """
        seen: dict[str, ChannelMoments] = {}
        for part in from_everyone(self._on_cpu):
            for name, moments in part.items():
                seen[name] = seen[name].merge(moments) if name in seen else moments
        found = {}
        for name, moments in seen.items():
            if name not in same_batches or same_batches[name].moments.count == 0:
                continue
            with_dropout, without = moments.var(correction=0), same_batches[name].moments.var(correction=0)
            ratio = with_dropout / without.cpu().double()
            ratio = ratio[torch.isfinite(ratio) & (ratio > 0)]
            if len(ratio):
                found[name] = float(ratio.log().mean().exp())
        return found

    def _on_cpu(self) -> dict[str, ChannelMoments]:
        return {
            name: ChannelMoments(each.count, each.mean.cpu().double(), each.m2.cpu().double())
            for name, each in self._seen.items()
        }
