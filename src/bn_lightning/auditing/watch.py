"""Watch a training through what its BatchNorm layers keep anyway: counters, statistics and modes."""

from collections.abc import Mapping

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.history import LayerHistory, TrainingHistory
from bn_lightning.layers.merge import statistics_spread

__all__ = ["TrainingWatch"]

# Places of the counters that are remembered, and of what they add up to.
_BATCH, _BACKWARD, _VALIDATION, _NOW = range(4)
_IN_ALL, _IN_BACKWARD, _IN_VALIDATION, _BETWEEN = range(4)


class TrainingWatch:
    """Counts how often running statistics are moved: forward, backward, between and in validation. No hook.

    ``num_batches_tracked`` of all layers is copied on the device in one operation, and leaves it when `history` is
    asked for. Whoever trains calls the methods at the moments of their names; `BatchNormAudit` does under a Trainer.
    With gradient accumulation or several optimizers a training batch is still one batch, whatever steps it takes, and
    one that was begun but not ended does not count.

    Args:
        layers: Name to BatchNorm layer. Of one without ``num_batches_tracked`` only the mode is watched, as the history
            tells.

    Example:
        >>> bn = torch.nn.BatchNorm1d(2)
        >>> watch = TrainingWatch({"norm": bn})
        >>> watch.begin_batch()
        >>> loss = bn(torch.randn(4, 2)).sum()
        >>> watch.before_backward()
        >>> loss.backward()
        >>> watch.after_backward()
        >>> watch.end_batch()
        >>> watch.history().layers["norm"].forward_updates
        1.0
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = dict(layers)
        counters = [each.num_batches_tracked for each in layers.values() if each.num_batches_tracked is not None]
        device = counters[0].device if counters else torch.device("cpu")
        self._nothing = torch.zeros((), dtype=torch.int64, device=device)
        self._at = torch.zeros(4, len(self._layers), dtype=torch.int64, device=device)
        self._views = [list(row.unbind()) for row in self._at]
        self._moved = torch.zeros(4, len(self._layers), dtype=torch.int64, device=device)
        self._batches = self._runs = self._backward_passes = 0
        self._began: list[str] = []
        self._is_between = False  # training batches, and the last counters are those of the latest end
        self._training = dict.fromkeys(self._layers, 0)
        self._validated: set[str] = set()
        self._spread: dict[str, float] = {}
        self._held: dict[str, torch.Tensor] = {}  # γ that needs no gradient, before the first batch

    def follow(self, layers: Mapping[str, _BatchNorm]) -> None:
        """Go on with what stands at the same names by now; a name without a layer is seen no more."""
        if any(layers.get(name) is not layer for name, layer in self._layers.items()):
            self._is_between = False  # a new layer's counter begins anywhere
        self._layers = {name: layers[name] for name in self._layers if name in layers}
        places = [place for place, name in enumerate(self._training) if name in self._layers]
        self._views = [[row.unbind()[place] for place in places] for row in self._at]

    def begin_batch(self) -> None:
        """Remember the counters, and which layers are in training mode, before a training batch."""
        self._copy(_BATCH)
        self._count_between(_BATCH)
        self._is_between = False
        if not self._batches:
            self._held = {
                name: layer.weight.detach().clone()
                for name, layer in self._layers.items()
                if layer.weight is not None and not layer.weight.requires_grad
            }
        self._began = [name for name, layer in self._layers.items() if layer.training]

    def before_backward(self) -> None:
        """Remember the counters before a backward pass, of which a batch may have several."""
        self._copy(_BACKWARD)

    def after_backward(self) -> None:
        """Count what the backward pass moved."""
        self._count(_IN_BACKWARD, _BACKWARD)
        self._backward_passes += 1

    def end_batch(self, runs: int = 1) -> None:
        """Count what the training batch moved.

        Args:
            runs: How often the whole step was run on it, as an optimizer with a closure (LBFGS) may do.
        """
        self._count(_IN_ALL, _BATCH)
        self._is_between = True
        self._batches += 1
        self._runs += runs
        for name in self._began:
            self._training[name] += 1

    def begin_validation(self) -> None:
        """Remember the counters before validation."""
        self._copy(_VALIDATION)
        self._count_between(_VALIDATION)

    def begin_validation_batch(self) -> None:
        """Note which layers are in training mode."""
        self._validated.update(name for name, layer in self._layers.items() if layer.training)

    def end_validation(self) -> None:
        """Count what validation moved."""
        self._count(_IN_VALIDATION, _VALIDATION)

    def end_training(self) -> None:
        """Count what moved since the last training batch or validation."""
        self._copy(_BATCH)
        self._count_between(_BATCH)
        self._is_between = False

    def look_across_processes(self) -> None:
        """Compare the processes' running statistics, before any of them is overwritten by another's.

        Every process has to call this; alone it does nothing. The worst look is kept.
        """
        for name, spread in statistics_spread(self._layers).items():
            self._spread[name] = max(spread, self._spread.get(name, 0.0))

    def history(self) -> TrainingHistory:
        """Tell what was seen so far; but for the look across processes the only method that waits for the device."""
        batches, layers = self._batches, {}
        for name, (in_all, backward, validation, between) in zip(self._training, self._moved.mT.tolist(), strict=True):
            reason = self._reason(name)
            layers[name] = LayerHistory(
                forward_updates=None if reason else (in_all - backward) / self._runs,
                backward_updates=None if reason else backward / self._runs,
                between_updates=between,
                validation_updates=validation,
                training_share=self._training[name] / batches if batches else None,
                validated_in_training_mode=name in self._validated,
                spread=self._spread.get(name),
                averaged=self._is_averaged(name),
                reason=reason,
            )
        return TrainingHistory(batches, layers)

    def _is_averaged(self, name: str) -> bool:
        layer, held = self._layers.get(name), self._held.get(name)
        if layer is None or held is None or layer.weight is None or layer.weight.requires_grad:
            return False
        return not torch.equal(layer.weight.detach(), held.to(layer.weight))

    def _reason(self, name: str) -> str | None:
        layer = self._layers.get(name)
        if layer is None:
            return "it has left the network"
        if layer.num_batches_tracked is None:
            return f"it does not count its updates (track_running_stats={layer.track_running_stats})"
        if not self._batches:
            return "no training batch was watched"
        if not self._backward_passes:
            return "no backward pass was watched, so that its updates cannot be told from those of the forward passes"
        return None

    def _copy(self, place: int) -> None:
        if self._layers:
            # Looked up anew each time: averaging weights and loading may bind other tensors. In the table itself, since
            # an attribute of a module costs more than all else here.
            held = [layer._buffers.get("num_batches_tracked") for layer in self._layers.values()]
            torch._foreach_copy_(self._views[place], [self._nothing if each is None else each for each in held])

    def _count(self, total: int, since: int) -> None:
        self._copy(_NOW)
        self._moved[total].add_(self._at[_NOW]).sub_(self._at[since])

    def _count_between(self, until: int) -> None:
        # Statistics that are reset or averaged set counters back, which are no updates.
        if self._is_between:
            self._moved[_BETWEEN].add_((self._at[until] - self._at[_NOW]).clamp_(min=0))
