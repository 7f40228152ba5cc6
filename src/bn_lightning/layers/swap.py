"""Change a layer in place, and change it back: its class, its attributes, its tensors, but never which object it is."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.layers.base import BatchNormVariant

__all__ = ["LayerChange", "forget_variant", "variant_attributes"]


class LayerChange:
    """What a conversion changes in one layer, noted so that it can be taken back.

    Only the conversion is taken back: what training, ``.to()``, ``.train()`` or the user changed since stays. A count
    of batches that the conversion raised is lowered by as much.

    Example:
        >>> layer = nn.BatchNorm1d(3)
        >>> change = LayerChange(layer)
        >>> layer.__class__ = nn.BatchNorm2d
        >>> change.note()
        >>> change.undo()
        >>> type(layer).__name__
        'BatchNorm1d'
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.undone = False
        self._before = _State(layer)
        self._after: _State | None = None

    def note(self) -> None:
        """Take down what the layer has become: what happens to it from here on is not the conversion's."""
        self._after = after = _State(self.layer)
        # Values that stayed need no copies.
        for name in [name for name, was in self._before.values.items() if _same(was, after.values.get(name))]:
            del self._before.values[name]
        after.values = {name: value for name, value in after.values.items() if name in self._before.values}

    @property
    def stands(self) -> bool:
        """Whether the layer still has the class that the conversion gave it."""
        after = self._after
        if after is None or type(self.layer) is not after.kind:
            return False
        return self.layer.__dict__.get("conversion") == after.attributes.get("conversion")

    @property
    def alters_training(self) -> bool:
        """Whether other tensors are to be learned or kept than before, which DDP has taken stock of."""
        assert self._after is not None
        return self._before.learning != self._after.learning or any(
            list(map(id, self._before.tables[table].values())) != list(map(id, self._after.tables[table].values()))
            for table in ("_parameters", "_buffers")
        )

    def undo(self) -> None:
        """Take the conversion back; again is harmless."""
        if self.undone:
            return
        before, after = self._before, self._after or _State(self.layer)
        later = variant_attributes(type(self.layer)) - before.attributes.keys()
        self.layer.__class__ = before.kind
        attributes = self.layer.__dict__
        for name in {*before.attributes, *after.attributes, *later}:
            if name not in before.attributes:
                attributes.pop(name, None)
            elif after.attributes.get(name, _ABSENT) is not before.attributes[name]:
                attributes[name] = before.attributes[name]
        for name, table in before.tables.items():
            _restore_table(attributes[name], table, after.tables.get(name, {}))
        for parameter, learned in before.learning.items():
            if after.learning.get(parameter, learned) == parameter.requires_grad:
                parameter.requires_grad_(learned)
        self._follow_device(before)
        self._restore_values(before, after)
        self.undone = True

    def _follow_device(self, before: "_State") -> None:
        """Bring tensors that were set aside to where the others went meanwhile."""
        now = next(iter(before.learning), None)
        if now is None or before.place == (now.device, now.dtype):
            return
        for buffer in before.tables["_buffers"].values():
            if buffer is not None:
                buffer.data = buffer.data.to(now.device, now.dtype if buffer.is_floating_point() else None)

    def _restore_values(self, before: "_State", after: "_State") -> None:
        for name, was in before.values.items():
            then, tensor = after.values.get(name), (self.layer._buffers | self.layer._parameters).get(name)
            if then is None or tensor is None or _same(was, then):
                continue
            now = tensor.detach().to(was.device)
            with torch.no_grad():
                if _same(now, then):
                    tensor.copy_(was)
                elif name == "num_batches_tracked" and bool(now >= then):
                    tensor.sub_((then - was).to(tensor.device))


def forget_variant(layer: nn.Module) -> None:
    """Take from a layer the attributes that belong to its variant, on the way to another class."""
    for name in variant_attributes(type(layer)):
        layer.__dict__.pop(name, None)


def variant_attributes(kind: type) -> set[str]:
    """Name the attributes that a variant has and plain BatchNorm does not."""
    variants = [base for base in kind.__mro__ if issubclass(base, BatchNormVariant)]
    own = {name for base in variants for name in (*inspect.get_annotations(base), *base.option_names())}
    return own - _TORCHS_OWN


_ABSENT = object()
_TORCHS_OWN = {"num_features", "eps", "momentum", "affine", "track_running_stats", "training", "process_group"}


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


class _State:
    """What a layer is at one moment, by reference; tensors by value too."""

    def __init__(self, layer: nn.Module) -> None:
        self.kind = type(layer)
        # The tables of a Module (parameters, buffers, children, hooks) are dicts, told apart entry by entry.
        self.tables: dict[str, dict[Any, Any]] = {
            name: dict(value) for name, value in layer.__dict__.items() if isinstance(value, dict)
        }
        self.attributes = {name: value for name, value in layer.__dict__.items() if name not in self.tables}
        parameters = [parameter for parameter in layer._parameters.values() if parameter is not None]
        self.learning = {parameter: parameter.requires_grad for parameter in parameters}
        self.place = (parameters[0].device, parameters[0].dtype) if parameters else None
        self.values: dict[str, Tensor] = {
            name: tensor.detach().clone()
            for name, tensor in (layer._buffers | layer._parameters).items()
            if tensor is not None and tensor.device.type != "meta"
        }


def _restore_table(table: dict[Any, Any], before: dict[Any, Any], after: dict[Any, Any]) -> None:
    restored = {}
    for key, value in before.items():
        if after.get(key, _ABSENT) is not value:
            restored[key] = value
        elif key in table:
            restored[key] = table[key]
    restored.update({key: value for key, value in table.items() if key not in before and key not in after})
    # In place: handles of hooks know the table itself.
    table.clear()
    table.update(restored)
