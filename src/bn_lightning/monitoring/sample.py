"""From one merged block of statistics to snapshots that can be read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bn_lightning.functional.activation import Row
from bn_lightning.monitoring.buffer import Layout
from bn_lightning.monitoring.layers import largest_finite
from bn_lightning.monitoring.snapshot import ActivationSnapshot

__all__ = ["SampleNotes", "describe_sample", "is_gradient", "of_gradient", "rescaled_gradients"]

_NO_GRADIENT = "no gradient came back"
# No module's name ends like this: a child is named by an attribute or a number.
_GRADIENT = " gradient"


def of_gradient(layer: str) -> str:
    """Return the name under which the statistics of a layer's gradient stand beside those of its output."""
    return layer + _GRADIENT


def is_gradient(name: str) -> bool:
    """Tell whether a name in a layout is a gradient's."""
    return name.endswith(_GRADIENT)


@dataclass(slots=True)
class SampleNotes:
    """What is known on the host about one sample.

    Attributes:
        called: The layers that ran, under the names of `of_gradient` those whose gradient was seen.
        reasons: The same names to why nothing, or not everything, was measured.
        limits: The same names to the largest finite value of the dtype.
    """

    called: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, dtype: torch.dtype | None = None, reason: str = "") -> None:
        """Note a call."""
        self.called.add(name)
        if dtype is not None:
            limit = largest_finite(dtype)
            self.limits[name] = min(limit, self.limits.get(name, limit))
        if reason:
            self.reasons[name] = reason


def rescaled_gradients(values: Tensor, layout: Layout, scale: Tensor) -> Tensor:
    """Divide the statistics of gradients by what the loss was multiplied by, on the device.

    Shape:
        ``values`` and result: (7, total channels). ``scale``: one value.
    """
    inverse = scale.to(values).reciprocal().reshape(())
    widths = torch.tensor([width for _, width in layout], device="cpu")
    ours = torch.tensor([is_gradient(name) for name, _ in layout], device="cpu")
    gradients = ours.repeat_interleave(widths)
    factor = torch.where(gradients.to(values.device, non_blocking=True), inverse, 1.0)
    scaled = values.clone()
    for row in (Row.MEAN, Row.MIN, Row.MAX):  # one by one: a list of rows would be copied to the device, waiting for it
        scaled[row] *= factor
    scaled[Row.M2] *= factor.square()
    return scaled


def describe_sample(
    values: Tensor,
    layout: Layout,
    notes: SampleNotes,
    names: Iterable[str],
    *,
    untapped: Mapping[str, str],
    absence: str,
    kinds: Mapping[str, str],
    gradients: bool,
    histograms: Mapping[str, Tensor],
    step: int | None,
) -> ActivationSnapshot:
    """Make a snapshot of what was measured.

    Args:
        values: On the CPU.
        layout: Which layers' columns they are.
        notes: What is known besides.
        names: All layers, those that have run in order of execution; some may be named twice.
        untapped: Layer to why it cannot be watched.
        absence: Why a layer that did not run has not.
        kinds: Layer to the name of its class.
        gradients: Whether gradients were measured.
        histograms: Layer to its counts.
        step: The optimizer step, if there is such a thing.

    Shape:
        ``values``: (7, total channels).
    """
    blocks: dict[str, list[Tensor]] = {}
    columns = values.split([channels for _, channels in layout], dim=1) if layout else ()
    for (name, _), block in zip(layout, columns, strict=True):
        if block[Row.COUNT].any():
            blocks.setdefault(name, []).append(block)
    names = dict.fromkeys([*names, *(name for name, _ in layout if not is_gradient(name))])

    def snapshot(keys: Mapping[str, str], kind: str, absence: str) -> ActivationSnapshot:
        nothing = values.new_empty(len(Row), 0)
        seen = {*blocks, *notes.called, *untapped}
        absent = [layer for layer, key in keys.items() if key not in seen]
        reasons = {layer: notes.reasons[key] for layer, key in keys.items() if key in notes.reasons}
        return ActivationSnapshot(
            {layer: torch.cat(blocks.get(key, [nothing]), dim=1) for layer, key in keys.items()},
            {**dict.fromkeys(absent, absence), **untapped, **reasons},
            frozenset(absent),
            step,
            {layer: notes.limits[key] for layer, key in keys.items() if key in notes.limits},
            kind=kind,
        )

    found = snapshot({name: name for name in names}, "activations", absence)
    back = snapshot({name: of_gradient(name) for name in names}, "gradients", _NO_GRADIENT) if gradients else None
    return replace(found, gradients=back, histograms=histograms, kinds=kinds)
