"""The momentum of running statistics under gradient accumulation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled
from bn_lightning.selection import require_batch_norms, unwrap

__all__ = ["AdjustedLayer", "MomentumResult", "accumulation_momentum", "adjust_momentum"]

_WARNING = (
    "This repairs the running average only: each micro-batch is still normalized by its own statistics, which are as "
    "noisy as before."
)
#: Kept on an adjusted layer, copied and saved with it: the momentum before, and the one that was set. A plain tuple, so
#: that a pickled network needs nothing of ours.
_RECORD = "_momentum_before_accumulation"
_Record = tuple[float, float]


def accumulation_momentum(momentum: float, accumulate_grad_batches: int) -> float:
    """Compute the momentum with which k micro-batches move running statistics as far as one large batch did.

    ``1 − (1 − momentum)^(1/k)``: after k updates the old value weighs 1 − ``momentum``, as it would after one.

    Args:
        momentum: Weight of the new batch, from 0 to 1.
        accumulate_grad_batches: k, micro-batches an optimizer step.

    Raises:
        BatchNormError: If either is out of range.

    Example:
        >>> accumulation_momentum(0.19, 2)
        0.1
    """
    if not isinstance(accumulate_grad_batches, int) or accumulate_grad_batches < 1:
        raise BatchNormError(
            f"accumulate_grad_batches counts the micro-batches of an optimizer step, got {accumulate_grad_batches!r}; "
            "1 is no accumulation."
        )
    if not 0 <= momentum <= 1:
        raise BatchNormError(f"momentum is the weight of the new batch, from 0 to 1, got {momentum!r}.")
    if momentum == 1 or accumulate_grad_batches == 1:
        return momentum
    return -math.expm1(math.log1p(-momentum) / accumulate_grad_batches)


@dataclass(frozen=True, slots=True)
class AdjustedLayer:
    """One row of a `MomentumResult`.

    Attributes:
        name: The layer.
        before: Its momentum (weight of the new batch) before; ``None`` is a cumulative average.
        after: Its momentum now.
        reason: Why it was left as it was, or ``None`` if it was adjusted.
    """

    name: str
    before: float | None
    after: float | None
    reason: str | None

    def to_dict(self) -> dict[str, str | float | None]:
        """Return the fields."""
        return {"name": self.name, "before": self.before, "after": self.after, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class MomentumResult(Tabled):
    """What `adjust_momentum` did, and the way back.

    Attributes:
        rows: One per selected layer, in registration order.
        accumulate_grad_batches: Micro-batches an optimizer step.
    """

    rows: tuple[AdjustedLayer, ...]
    accumulate_grad_batches: int
    _before: tuple[tuple[_BatchNorm, float | None, _Record | None], ...] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Put the former momenta back, whatever they became since."""
        for layer, momentum, record in self._before:
            _write(layer, momentum, record)

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "accumulate_grad_batches": self.accumulate_grad_batches,
            "warning": _WARNING,
            "layers": [row.to_dict() for row in self.rows],
        }

    def table(self) -> Table:
        """One row a layer."""
        done = sum(row.reason is None for row in self.rows)
        return Table(
            f"adjusted the momentum of {done} of {len(self.rows)} BatchNorm layers "
            f"to accumulate_grad_batches={self.accumulate_grad_batches}",
            ("layer", "momentum before", "momentum after", "left as it was because"),
            [(row.name or "(root)", row.before, row.after, row.reason) for row in self.rows],
            (_WARNING,),
        )


def adjust_momentum(
    model: nn.Module,
    accumulate_grad_batches: int,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> MomentumResult:
    """Give BN layers the momentum for which gradient accumulation moves running statistics as one large batch would.

    It repairs the running average only: the statistics that normalize each micro-batch are as noisy as before. Where
    that hurts, larger micro-batches or `BatchRenorm` help. Applied again it does not compound: it begins with
    the momentum the layer had at first, unless somebody else has changed it since.

    Args:
        model: The network, changed in place; DDP and ``torch.compile`` wrappers are looked through.
        accumulate_grad_batches: As the Trainer's: micro-batches an optimizer step. 1 leads back.
        include: Name patterns (``fnmatch``) of the BN layers to adjust; empty means all.
        exclude: Name patterns of the BN layers to leave out.

    Returns:
        One row a layer, with the reason where it was left as it was; ``.undo()`` puts the momenta back.

    Raises:
        BatchNormError: If k is less than 1, a momentum is not within 0 to 1, there is no BN layer, or a pattern matches
            none. Nothing is changed then.

    Example:
        >>> bn = nn.BatchNorm1d(3, momentum=0.19)
        >>> result = adjust_momentum(bn, accumulate_grad_batches=2)
        >>> bn.momentum
        0.1
        >>> result.undo()
        >>> bn.momentum
        0.19
    """
    accumulation_momentum(0.0, accumulate_grad_batches)  # refuse a wrong k even where no layer needs it
    layers = require_batch_norms(unwrap(model), include, exclude)
    rows = tuple(_row(name, layer, accumulate_grad_batches) for name, layer in layers.items())
    before = tuple((layer, layer.momentum, _record(layer)) for layer in layers.values())
    for row, layer in zip(rows, layers.values(), strict=True):
        if row.reason is None:
            assert row.after is not None
            original = _original_momentum(layer)
            assert original is not None
            _write(layer, row.after, (original, row.after) if row.after != original else None)
    return MomentumResult(rows, accumulate_grad_batches, before)


def _row(name: str, layer: _BatchNorm, accumulate_grad_batches: int) -> AdjustedLayer:
    before = layer.momentum
    original = _original_momentum(layer)
    if layer.running_mean is None:
        return AdjustedLayer(name, before, before, "it keeps no running statistics")
    if isinstance(layer, FrozenBatchNorm):
        return AdjustedLayer(name, before, before, "it never moves its running statistics")
    if original is None:
        return AdjustedLayer(name, None, None, "a cumulative average (momentum=None) weighs all batches alike already")
    try:
        after = accumulation_momentum(original, accumulate_grad_batches)
    except BatchNormError as error:
        raise BatchNormError(f"layer {name or '(root)'!r} ({type(layer).__name__}): {error}") from error
    return AdjustedLayer(name, before, after, "its momentum is that already" if after == before else None)


def _record(layer: _BatchNorm) -> _Record | None:
    record: _Record | None = layer.__dict__.get(_RECORD)
    return record


def _original_momentum(layer: _BatchNorm) -> float | None:
    record = _record(layer)
    return layer.momentum if record is None or record[1] != layer.momentum else record[0]


def _write(layer: _BatchNorm, momentum: float | None, record: _Record | None) -> None:
    layer.momentum = momentum
    if record is None:
        layer.__dict__.pop(_RECORD, None)
    else:
        layer.__dict__[_RECORD] = record
