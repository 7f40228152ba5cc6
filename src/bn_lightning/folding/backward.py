"""Fold a layer into what makes its input, through everything that only passes channels on."""

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
from bn_lightning.tracing.passing import MIXED, Terms

__all__ = ["fold_backward"]


def fold_backward(scene: Scene, norm: Norm, mergeable: set[str]) -> FoldStep | Kept:
    """Find the layers whose outputs are all that a BatchNorm layer normalizes, or the first reason against it.

    Every value between them and the layer is followed channel by channel: a channel may be scaled if everything that
    reads it, over all example calls, reads it behind this very channel of the layer.

    Args:
        scene: The model and its record.
        norm: The layer.
        mergeable: Names of BatchNorm layers that may take up another's work.
    """
    cone = Cone(scene.record, scene.bypasses(), scene.normalized())
    for call in norm.calls:
        cone.climb(call.input)
    found = _makers(scene, norm, cone, mergeable)
    if isinstance(found, Kept):
        return found
    kept = _sole_uses(scene, found)
    if kept:
        return kept
    stopped = cone.carry({value: terms for maker in found.values() for value, terms in maker.terms.items()})
    if stopped is not None:
        return Kept("nonlinear_between", f"fed by {stopped}")
    size = sum(maker.channels for maker in found.values())
    arrival = _arrival(scene, norm, cone, size)
    if isinstance(arrival, Kept):
        return arrival
    kept = scene.hook_on(cone.values) or _exposed(scene, norm, cone, arrival)
    if kept:
        return kept
    targets = [maker.taking(arrival) for maker in found.values()]
    targets = [target for target in targets if any(channel >= 0 for channel in target.channels)]
    merged = all(target.kind == "batch_norm" for target in targets)
    return FoldStep(
        norm,
        "merged" if merged else "folded-backward",
        tuple(targets),
        behind=tuple(sorted({made.name for value in cone.linked if (made := scene.norm_that_made(value))})),
        positive=arrival.positive,
        unshifted=arrival.unshifted,
        roundabout=_roundabout(norm, cone, found),
    )


@dataclass(slots=True)
class _Maker:
    """A layer that makes some of what is normalized.

    Attributes:
        target: The layer.
        first: The tag of its first channel.
        channels: How many it has.
        terms: The tags of each value it makes.
        operations: Indices of the operations that make them.
        called: Whether the module itself was called each time.
    """

    target: FoldTarget
    first: int
    channels: int
    terms: dict[int, Terms]
    operations: set[int]
    called: bool = True

    def taking(self, arrival: "_Arrival") -> FoldTarget:
        """Return the target with the channels it has to take."""
        mine = slice(self.first, self.first + self.channels)
        return replace(
            self.target,
            channels=tuple(arrival.channel[mine].tolist()),
            shifted=tuple(arrival.shifted[mine].tolist()),
        )


def _makers(scene: Scene, norm: Norm, cone: Cone, mergeable: set[str]) -> dict[str, _Maker] | Kept:
    """Tag the channels of every layer that the values come from."""
    makers: dict[str, _Maker] = {}
    for value in sorted(cone.sources):
        producer, shape = scene.record.producer(value), scene.record.values[value].shape
        other = scene.norm_that_made(value)
        if other is norm:
            return Kept("reused", "it normalizes what it made itself")
        if other is not None and other.name in mergeable:
            target, axis, operations = norm_target(scene.model, other), 1, other.operations_making(value)
        elif producer is not None and producer.kind in LAYER_KINDS and producer.layer is not None:
            target, operations = layer_target(scene.model, producer), {producer.index}
            axis = -1
        elif producer is None:
            return Kept("nonlinear_between", "fed by an input of the model, a constant or code that was not recorded")
        else:
            return Kept("nonlinear_between", f"fed by {producer}")
        if isinstance(target, Kept):
            return target
        assert producer is not None
        if other is None or target.norm is None:
            axis = channel_axis(producer, len(shape), reference_tensor(scene.model, target).dim())
        channels = shape[axis]
        first = sum(maker.channels for maker in makers.values())
        maker = makers.setdefault(target.weight, _Maker(target, first, channels, {}, set()))
        if maker.target != target or maker.channels != channels:
            return Kept("reused", f"{target.weight!r} is used in more than one way")
        maker.terms[value] = tagged(shape, axis, maker.first)
        maker.operations |= operations
        maker.called &= producer.module == target.layer
    return makers


def _sole_uses(scene: Scene, makers: dict[str, _Maker]) -> Kept | None:
    for maker in makers.values():
        kept = require_sole_use(scene, maker.target, maker.operations)
        if kept:
            return kept
    return None


@dataclass(frozen=True, slots=True)
class _Arrival:
    """Where the makers' channels arrive.

    Attributes:
        channel: For each tag the channel of the layer that normalizes it, −1 for none.
        shifted: For each tag whether the shift is its to take.
        positive: Channels whose scale must not be negative.
        unshifted: Channels whose shift has to be zero.
    """

    channel: Tensor
    shifted: Tensor
    positive: tuple[int, ...]
    unshifted: tuple[int, ...]


def _arrival(scene: Scene, norm: Norm, cone: Cone, size: int) -> _Arrival | Kept:
    channel = torch.full((size,), -1, dtype=torch.int64)
    shifted = torch.zeros(size, dtype=torch.bool)
    unshifted: set[int] = set()
    padded = torch.tensor(sorted(cone.passed_by(lambda passing: passing.may_pad)), dtype=torch.float64)
    for call in norm.calls:
        shape = "×".join(map(str, scene.record.values[call.input].shape))
        found = [_by_channel(term) for term in cone.terms[call.input] if term.numel()]
        # In a sum the shift goes to one summand, which has to be there in every place.
        everywhere = [
            number for number, (tags, _) in enumerate(found) if (tags >= 0).all() and not torch.isin(tags, padded).any()
        ]
        taking = everywhere[0] if everywhere else 0
        for number, (tags, rows) in enumerate(found):
            if (tags == MIXED).any():
                return Kept("axis_mismatch", f"channels are mixed on the way to its input, {shape}")
            if number == taking:
                unshifted.update(rows[tags < 0].tolist())  # nothing there that could take the shift
            arriving, at = tags[tags >= 0].long(), rows[tags >= 0]
            if len(arriving.unique()) < len(arriving) or not _agree(channel[arriving], at):
                return Kept(
                    "axis_mismatch",
                    f"{_names(scene, cone)} gives {shape}, where dim 1 is not its channels",
                )
            known = channel[arriving] >= 0
            if (shifted[arriving][known] != (number == taking)).any():
                return Kept("reused", f"the output of {_names(scene, cone)} is added to itself")
            channel[arriving], shifted[arriving] = at, number == taking
    positive = _channels(channel, cone.passed_by(lambda passing: passing.kind == "largest"))
    unshifted |= _channels(channel, {int(tag) for tag in padded if shifted[int(tag)]})
    return _Arrival(channel, shifted, tuple(sorted(positive)), tuple(sorted(unshifted)))


def _channels(channel: Tensor, tags: set[int]) -> set[int]:
    return {int(channel[tag]) for tag in tags if channel[tag] >= 0}


def _by_channel(term: Tensor) -> tuple[Tensor, Tensor]:
    """List the tags that stand in each channel, once each."""
    small = compact(term)
    by_channel = small.movedim(1, 0).flatten(1).expand(term.shape[1], -1)
    rows = torch.arange(len(by_channel))
    lowest = by_channel.amin(1)
    if torch.equal(lowest, by_channel.amax(1)):
        return lowest, rows
    codes = torch.stack([by_channel, rows[:, None].expand_as(by_channel).double()]).flatten(1).unique(dim=1)
    return codes[0], codes[1].long()


def _agree(known: Tensor, found: Tensor) -> bool:
    return bool(((known < 0) | (known == found)).all())


def _exposed(scene: Scene, norm: Norm, cone: Cone, arrival: _Arrival) -> Kept | None:
    """Find who else would see a channel that is to change."""
    inside = cone.operations.keys() | norm.operations
    bypassed: dict[int, set[int]] = {}
    for call in scene.bypasses():
        if call.output in cone.linked:
            bypassed.setdefault(call.input, set()).update(call.operations)
    for index in sorted(cone.terms):
        through = inside | bypassed.get(index, set())
        others = [reader for reader in scene.record.readers(index) if reader.index not in through]
        producer = scene.record.producer(index)
        seen = scene.seen_outside(index)
        if others:
            seen = Kept("multi_user", f"the output of {producer} is also read by {others[0]}")
        if seen is not None:
            tags = torch.cat([compact(term).flatten() for term in cone.terms[index]])
            # An empty value has no channel here, and may have one in another call.
            if not tags.numel() or (arrival.channel[tags[tags >= 0].long()] >= 0).any() or (tags == MIXED).any():
                return seen
    return None


def _roundabout(norm: Norm, cone: Cone, makers: dict[str, _Maker]) -> str | None:
    """Say why the value may have left its maker otherwise than as what the maker's forward returns."""
    if len(makers) != 1:
        return "it is folded into several layers"
    if cone.operations or cone.linked:
        between = [str(operation) for operation in cone.operations.values()]
        return f"it is folded through {between[0] if between else 'another layer'}"
    (maker,) = makers.values()
    layer = maker.target.layer
    if not layer or norm.name.startswith(f"{layer}.") or not maker.called:
        return f"{repr(layer) if layer else 'the root module'} does more than that layer"
    return None


def _names(scene: Scene, cone: Cone) -> str:
    return " and ".join(sorted({str(scene.record.producer(value)) for value in cone.sources})[:2])
