"""Fold a layer into what reads its output, through everything that only passes channels on."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bn_lightning.folding.norms import Norm
from bn_lightning.folding.numbers import reference_tensor
from bn_lightning.folding.reasons import Kept
from bn_lightning.folding.scene import Scene
from bn_lightning.folding.steps import FoldStep, FoldTarget
from bn_lightning.folding.targets import LAYER_KINDS, layer_target, norm_target, require_sole_use
from bn_lightning.tracing.channels import Cone, channel_axis, compact, tagged
from bn_lightning.tracing.passing import ABSENT, MIXED, ZERO
from bn_lightning.tracing.record import Operation

__all__ = ["fold_forward"]


def fold_forward(scene: Scene, norm: Norm, mergeable: set[str]) -> FoldStep | Kept:
    """Find the layers that are all that reads a BatchNorm layer's output, or the first reason against it.

    Args:
        scene: The model and its record.
        norm: The layer.
        mergeable: Names of BatchNorm layers that may take up another's work.
    """
    cone = Cone(scene.record, scene.bypasses())
    for call in norm.calls:
        cone.descend(call.output)
    kept = scene.hook_on(cone.values) or next(filter(None, map(scene.seen_outside, sorted(cone.values))), None)
    if kept:
        return kept
    stopped = cone.carry({call.output: tagged(_shape(scene, call.output), 1, 0) for call in norm.calls})
    if stopped is not None:
        return Kept("nonlinear_between", f"read by {stopped}")
    takers: dict[str, _Taker] = {}
    # A layer that reads nothing (no boxes, say) tells nothing of channels; what else reads it may read something once.
    idle = {
        operation.index
        for operation, value in cone.readers
        if 0 in _shape(scene, value) and operation.kind in (*LAYER_KINDS, "batch_norm")
    }
    for operation, value in cone.readers:
        if operation.index in idle:
            continue
        taker = _taker(scene, norm, operation, value, cone.terms[value], mergeable)
        if isinstance(taker, Kept):
            return taker
        before = takers.setdefault(taker.target.weight, taker)
        if before.target != taker.target:
            return Kept("reused", f"{taker.target.weight!r} is applied to more than one kind of input")
        before.operations |= taker.operations
        before.unshifted |= taker.unshifted
    if not takers:
        return Kept("nonlinear_between", "nothing reads its output")
    for taker in takers.values():
        kept = require_sole_use(scene, taker.target, taker.operations | idle)
        if kept:
            return kept
    padded = cone.passed_by(lambda passing: passing.may_pad)
    targets = tuple(taker.target for taker in takers.values())
    merged = all(target.kind == "batch_norm" for target in targets)
    passed = {made.name for value in cone.linked if (made := scene.norm_that_made(value))}
    return FoldStep(
        norm,
        "merged" if merged else "folded-forward",
        targets,
        forward=True,
        behind=tuple(sorted(passed)),
        positive=tuple(sorted(cone.passed_by(lambda passing: passing.kind == "largest"))),
        unshifted=tuple(sorted(padded.union(*(taker.unshifted for taker in takers.values())))),
        roundabout="it is folded forward",
    )


@dataclass(slots=True)
class _Taker:
    """A layer that reads what is to be left out."""

    target: FoldTarget
    operations: set[int]
    unshifted: set[int]


def _taker(
    scene: Scene, norm: Norm, operation: Operation, value: int, terms: Iterable[Tensor], mergeable: set[str]
) -> _Taker | Kept:
    """Tell which of a reader's input channels carry which channel of the layer."""
    other = scene.norm_that_reads(operation, value)
    dims = len(_shape(scene, value))
    if other is not None and other is not norm and other.name in mergeable:
        target, axis, operations = norm_target(scene.model, other), 1, other.operations_reading(value)
        pads = False
    elif operation.kind in LAYER_KINDS and operation.layer is not None and operation.layer.input == value:
        target, operations = layer_target(scene.model, operation), {operation.index}
        pads, axis = operation.layer.reads_padding, -1
    else:
        return Kept("nonlinear_between", f"read by {operation}")
    if isinstance(target, Kept):
        return target
    if target.norm is None:
        axis = channel_axis(operation, dims, reference_tensor(scene.model, target).dim())
    (term,) = terms
    found = _channels(term, axis)
    if found is None:
        return Kept("axis_mismatch", f"{operation} reads several of its channels as one")
    channels, beside_zeros = found
    unshifted = set((channels if pads else channels[beside_zeros]).tolist())
    return _Taker(
        replace(target, channels=tuple(channels.tolist()), shifted=tuple((channels >= 0).tolist())),
        operations,
        unshifted - {int(ABSENT)},
    )


def _channels(term: Tensor, axis: int) -> tuple[Tensor, Tensor] | None:
    """Tell for each index along an axis whose channel stands there, and whether zeros stand there too.

    Returns:
        The channels, −1 for none, and a mask; ``None`` if several stand in one place.
    """
    rows = compact(term).movedim(axis, 0).flatten(1).expand(term.shape[axis], -1)
    zero = rows == ZERO
    lowest = torch.where(zero, float("inf"), rows).amin(1)
    highest = torch.where(zero, float("-inf"), rows).amax(1)
    empty = zero.all(1)
    if (rows == MIXED).any() or not ((lowest == highest) | empty).all():
        return None
    return torch.where(empty, ABSENT, lowest).long(), zero.any(1)


def _shape(scene: Scene, value: int) -> tuple[int, ...]:
    return scene.record.values[value].shape
