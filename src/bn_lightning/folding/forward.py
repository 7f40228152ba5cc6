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
    kept = scene.hook_on(cone.values) or _seen_outside(scene, cone)
    if kept:
        return kept
    kept = _overwritten(scene, norm, cone)
    if kept:
        return kept
    if not cone.readers:
        return Kept("nonlinear_between", "nothing reads its output")
    stopped = cone.carry({call.output: tagged(_shape(scene, call.output), 1, 0) for call in norm.calls})
    if stopped is not None:
        return Kept("nonlinear_between", f"read by {stopped}")
    takers: dict[str, _Taker] = {}
    for operation, value in cone.readers:
        taker = _taker(scene, norm, operation, value, cone.terms[value], mergeable)
        if isinstance(taker, Kept):
            return taker
        before = takers.setdefault(taker.target.weight, taker)
        if before.target != taker.target:
            return Kept("reused", f"{taker.target.weight!r} is applied to more than one kind of input")
        before.operations |= taker.operations
        before.unshifted |= taker.unshifted
    for taker in takers.values():
        kept = require_sole_use(scene, taker.target, taker.operations)
        if kept:
            return kept
    targets = tuple(taker.target for taker in takers.values())
    merged = all(target.kind == "batch_norm" for target in targets)
    passed = {made.name for value in cone.linked if (made := scene.norm_that_made(value))}
    return FoldStep(
        norm,
        "merged" if merged else "folded-forward",
        targets,
        forward=True,
        behind=tuple(sorted(passed)),
        positive=_under_a_maximum(cone),
        roundabout="it is folded forward",
        unshifted=tuple(sorted(set().union(*(taker.unshifted for taker in takers.values())))),
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


def _overwritten(scene: Scene, norm: Norm, cone: Cone) -> Kept | None:
    """Find who writes to what the layer reads, which its readers would then see instead of what it made."""
    last = max((operation.index for operation, _ in cone.readers), default=0)
    for call in norm.calls:
        memory = scene.record.values[call.input].memory
        for operation in scene.record.operations[min(call.operations) + 1 : last]:
            if memory >= 0 and memory in operation.overwrites:
                return Kept("multi_user", f"its input is overwritten by {operation} before its output is read")
    return None


def _under_a_maximum(cone: Cone) -> tuple[int, ...]:
    """List the channels that a maximum is taken of on the way."""
    found = [
        compact(term).flatten().unique()
        for operation in cone.operations.values()
        if operation.passing is not None and operation.passing.kind == "largest"
        for output in operation.outputs
        for term in cone.terms[output]
    ]
    return tuple(sorted({int(tag) for tags in found for tag in tags if tag >= 0}))


def _seen_outside(scene: Scene, cone: Cone) -> Kept | None:
    for index in sorted(cone.values):
        value, producer = scene.record.values[index], scene.record.producer(index)
        if value.output:
            return Kept("output", f"the model returns the output of {producer}")
        if value.escaped:
            return Kept("escaped", f"the output of {producer} is kept somewhere after the forward pass")
        if value.unseen:
            unseen = value.unseen[0]
            return Kept("opaque", f"the output of {producer} is read by {unseen} in code that cannot be recorded")
    return None


def _shape(scene: Scene, value: int) -> tuple[int, ...]:
    return scene.record.values[value].shape
