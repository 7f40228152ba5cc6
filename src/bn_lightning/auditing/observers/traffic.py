"""How often a layer runs in one training step: with gradient, without, and again in the backward pass."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.observer import Observer, each_input
from bn_lightning.internals import in_backward, in_reentrant_checkpoint

__all__ = ["LayerTraffic", "TrafficObserver"]


@dataclass(frozen=True, slots=True)
class LayerTraffic:
    """How often a layer runs, a batch.

    Attributes:
        with_gradient: In the forward pass, recorded for the backward pass or to be computed again in it.
        without_gradient: In the forward pass, under ``torch.no_grad()``.
        recomputed: During the backward pass, unless its statistics are paused there. The reading of the audit may not
            get that far with ``checkpoint(…, use_reentrant=True)``: what runs in one counts as computed again.
        moving: Calls of the whole step that move running statistics when all of the model is in training mode: those
            under ``model.eval()`` or with paused statistics do not.
    """

    with_gradient: float
    without_gradient: float
    recomputed: float
    moving: float


class TrafficObserver(Observer):
    """Counts calls in the pass that runs with gradients, and those in training mode in the one that runs so."""

    passes: ClassVar[tuple[str, ...]] = ("full_training", "deployed")

    def __init__(self) -> None:
        self._whole: Counter[tuple[str, str]] = Counter()
        self._pending: Counter[tuple[str, str]] = Counter()
        self._batches: Counter[str] = Counter()
        self._pass = ""
        self._buffers: dict[str, Tensor | None] = {}

    @contextmanager
    def watching(self, network: nn.Module, layers: Mapping[str, _BatchNorm], name: str) -> Iterator[None]:
        """Watch one pass."""
        self._pass = name
        self._buffers = {each: layer.running_mean for each, layer in layers.items()}
        with each_input(layers, self._see):
            yield

    def begin_batch(self) -> None:
        """Forget a batch that failed."""
        self._pending.clear()

    def end_batch(self) -> None:
        """Count the batch."""
        self._whole.update(self._pending)
        self._batches[self._pass] += 1
        self._pending.clear()

    def traffic(self) -> dict[str, LayerTraffic]:
        """Tell what was seen, by layer; empty without a pass that ran with gradients."""
        batches, trained = self._batches["deployed"], self._batches["full_training"]
        if not batches or not trained:
            return {}
        return {
            name: LayerTraffic(
                self._whole[name, "with gradient"] / batches,
                self._whole[name, "without gradient"] / batches,
                max(self._whole[name, "backward"], self._whole[name, "reentrant"]) / batches,
                self._whole[name, "moving"] / trained,
            )
            for name in dict.fromkeys(name for name, _ in self._whole)
        }

    def _see(self, name: str, layer: _BatchNorm, x: Tensor) -> None:
        # Where the step pauses the statistics of a call, it binds others for as long.
        paused = layer.running_mean is not self._buffers[name]
        if self._pass == "full_training":
            self._pending[name, "moving"] += layer.training and layer.track_running_stats and not paused
        elif in_backward():
            self._pending[name, "backward"] += not paused
        elif torch.is_grad_enabled():
            self._pending[name, "with gradient"] += 1
        elif in_reentrant_checkpoint():
            self._pending[name, "with gradient"] += 1
            self._pending[name, "reentrant"] += 1
        else:
            self._pending[name, "without gradient"] += 1
