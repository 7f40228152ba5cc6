"""Decide whether one BatchNorm layer may be folded; every guard names what it saw."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from bn_lightning.folding.arithmetic import folded_tensors, owned_tensor
from bn_lightning.folding.report import FoldPair
from bn_lightning.internals import hooks_on
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.tracing.layers import TENSOR_ROLES
from bn_lightning.tracing.record import ForwardRecord, Operation

__all__ = ["Kept", "Scene", "decide"]

_KNOWN_FORWARDS = (_BatchNorm.forward, SyncBatchNorm.forward)
_PRODUCERS = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True, slots=True)
class Kept:
    """Why a layer stays: a code of `report.REASONS` and the same with names."""

    reason: str
    detail: str


class Scene:
    """A model, its recorded forward pass, and where its tensors lie in memory."""

    def __init__(self, model: nn.Module, record: ForwardRecord) -> None:
        self.model = model
        self.record = record
        self._spans = [
            (name, tensor, *_span(tensor))
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.numel()
        ]

    def sharing_memory(self, name: str) -> list[str]:
        """Name the other parameters and buffers that lie in the same memory."""
        tensor = owned_tensor(self.model, name)
        if tensor is None:
            return []
        first, last = _span(tensor)
        return [
            other
            for other, candidate, start, end in self._spans
            if start <= last and first <= end and candidate is not tensor and candidate.device == tensor.device
        ]


def decide(scene: Scene, name: str, bn: _BatchNorm) -> FoldPair | Kept:
    """Find the layer that can take this one up, or the first reason against it."""
    kept = _as_a_module(name, bn)
    if kept:
        return kept
    calls = [
        operation
        for operation in scene.record.of_kind("batch_norm")
        if operation.layer and (operation.module == name or name in operation.layer.owners("running_mean"))
    ]
    kept = _as_called(scene, name, bn, calls)
    if kept:
        return kept
    pairs: list[FoldPair] = []
    producers: list[Operation] = []
    for call in calls:
        found = _producer(scene, name, call)
        if isinstance(found, Kept):
            return found
        pair, producer = found
        if pairs and pair != pairs[0]:
            return Kept("reused", f"it normalizes the outputs of both {pairs[0].producer!r} and {pair.producer!r}")
        pairs.append(pair)
        producers.append(producer)
    kept = _as_written(scene, pairs[0], producers) or _as_numbers(scene.model, pairs[0])
    return kept or replace(pairs[0], called=_is_called(pairs[0], producers))


def _as_a_module(name: str, bn: _BatchNorm) -> Kept | None:
    """What the layer itself tells, before any call."""
    if bn.training:
        return Kept("training", f"call .eval() on {name!r}: in training mode it normalizes by the batch")
    if bn.running_mean is None or bn.running_var is None:
        return Kept(
            "no_stats", f"track_running_stats={bn.track_running_stats}: it normalizes by the batch in evaluation"
        )
    if type(bn).forward not in _KNOWN_FORWARDS:
        cure = "; bn_lightning.revert_batch_norm first" if isinstance(bn, BatchNormVariant) else ""
        return Kept("subclass", f"{type(bn).__name__} has a forward of its own{cure}")
    return _hooked(name, bn)


def _as_called(scene: Scene, name: str, bn: _BatchNorm, calls: Sequence[Operation]) -> Kept | None:
    """What the calls of the layer tell: by whom and with which tensors."""
    record = scene.record
    for role in TENSOR_ROLES:
        kernels = record.unseen_tensors.get(_join(name, role))
        if kernels:
            return Kept("opaque", f"its {role} is read by {kernels[0]} in code that cannot be recorded")
    if not calls:
        return Kept("not_reached", "no example call reaches it")
    for call in calls:
        assert call.layer is not None
        for role in TENSOR_ROLES:
            names = call.layer.tensors.get(role)
            if names == ():
                return Kept("parametrized", f"its {role} is computed anew at every call, not a parameter of the model")
            if names and names != (_join(name, role),):
                other = next(other for other in names if other != _join(name, role))
                return Kept("tied", f"its {role} is also {other!r}")
        if call.module != name:
            return Kept("functional", f"{call.module or 'the root module'!r} calls batch_norm with its statistics")
    for role in TENSOR_ROLES:
        for reader in record.tensor_readers(_join(name, role)):
            if reader not in calls:
                return Kept("tied", f"its {role} is also read by {reader}")
    return None


def _producer(scene: Scene, name: str, call: Operation) -> tuple[FoldPair, Operation] | Kept:
    """What feeds one call of the layer, and who else sees that value."""
    record = scene.record
    assert call.layer is not None
    producer = None if call.layer.input is None else record.producer(call.layer.input)
    if call.layer.input is None or producer is None:
        return Kept("nonlinear_between", "fed by an input of the model, a constant or code that was not recorded")
    if producer.kind not in _PRODUCERS or producer.layer is None:
        return Kept("nonlinear_between", f"fed by {producer}")
    value = record.values[call.layer.input]
    others = [reader for reader in record.readers(value.index) if reader is not call]
    if others:
        return Kept("multi_user", f"the output of {producer} is also read by {others[0]}")
    if value.output:
        return Kept("output", f"the model returns the output of {producer}")
    if value.escaped:
        return Kept("escaped", f"the output of {producer} is kept somewhere after the forward pass")
    if value.unseen:
        return Kept("opaque", f"the output of {producer} is read by {value.unseen[0]} in code that cannot be recorded")
    pair = _pair(scene.model, name, producer)
    if isinstance(pair, Kept):
        return pair
    weight = owned_tensor(scene.model, pair.weight)
    # A convolution's channels are at dim 1 only with a batch axis, a linear layer's only on (N, C).
    if weight is None or len(value.shape) != weight.dim():
        shape = "×".join(map(str, value.shape))
        return Kept("axis_mismatch", f"{producer} gives {shape}, whose dim 1 is not its channels")
    return pair, producer


def _pair(model: nn.Module, name: str, producer: Operation) -> FoldPair | Kept:
    """Name the producer's weight and bias as the model owns them."""
    assert producer.layer is not None
    owned: dict[str, str] = {}
    for role in ("weight", "bias"):
        names = producer.layer.tensors.get(role)
        if names == ():
            return Kept("parametrized", f"the {role} of {producer} is computed, not a parameter of the model")
        if names and len(names) > 1:
            return Kept("tied", f"the {role} of {producer} is both {names[0]!r} and {names[1]!r}")
        if names:
            owned[role] = names[0]
    owner = owned["weight"].rpartition(".")[0]
    module = model.get_submodule(owner)
    if "bias" not in owned:
        if producer.module != owner:
            return Kept("functional", f"{producer} uses the weight of {owner!r} without a bias, and takes no new one")
        if module._parameters.get("bias", module) is not None:
            return Kept("subclass", f"{type(module).__name__} {owner!r} has no free bias to fold the shift into")
    return FoldPair(
        batch_norm=name,
        producer=owner,
        weight=owned["weight"],
        bias=owned.get("bias", _join(owner, "bias")),
        kind=producer.kind,
        groups=producer.layer.groups,
    )


def _is_called(pair: FoldPair, producers: Sequence[Operation]) -> bool:
    """Whether the value can only have left the producer as what its forward returns."""
    inside = not pair.producer or pair.batch_norm.startswith(f"{pair.producer}.")
    return not inside and all(operation.module == pair.producer for operation in producers)


def _as_written(scene: Scene, pair: FoldPair, producers: Sequence[Operation]) -> Kept | None:
    """Who else uses the tensors that would be written."""
    for name in (pair.weight, pair.bias):
        for reader in scene.record.tensor_readers(name):
            if reader not in producers:
                reused = reader.kind in _PRODUCERS
                return Kept(
                    "reused" if reused else "tied",
                    f"{name!r} is also {'applied' if reused else 'read'} by {reader}"
                    + (f", whose output goes to {_destination(scene.record, reader)}" if reused else ""),
                )
        kernels = scene.record.unseen_tensors.get(name)
        if kernels:
            return Kept("opaque", f"{name!r} is read by {kernels[0]} in code that cannot be recorded")
        shared = scene.sharing_memory(name)
        if shared:
            return Kept("tied", f"{name!r} lies in the same memory as {shared[0]!r}")
    return _hooked(pair.producer, scene.model.get_submodule(pair.producer))


def _as_numbers(model: nn.Module, pair: FoldPair) -> Kept | None:
    """Whether the folded weight and bias are numbers that their dtype holds."""
    bn = model.get_submodule(pair.batch_norm)
    sources = {role: getattr(bn, role) for role in TENSOR_ROLES}
    sources |= {name: owned_tensor(model, name) for name in (pair.weight, pair.bias)}
    for role, tensor in sources.items():
        if tensor is not None and not tensor.isfinite().all():
            where = (~tensor.detach().isfinite()).nonzero()[0].tolist()
            return Kept(
                "nonfinite",
                f"its {role} is {tensor[tuple(where)].item()} at channel {where[0]}"
                if role in TENSOR_ROLES
                else f"{role!r} is {tensor[tuple(where)].item()} at {where}",
            )
    assert isinstance(bn, _BatchNorm)
    assert bn.running_var is not None
    lowest = int(bn.running_var.argmin())
    if float(bn.running_var[lowest]) + bn.eps <= 0:
        return Kept(
            "nonfinite", f"running_var + eps is {float(bn.running_var[lowest]) + bn.eps:.3g} at channel {lowest}"
        )
    for name, folded in zip((pair.weight, pair.bias), folded_tensors(model, pair), strict=True):
        if not folded.isfinite().all():
            return Kept("overflow", f"folded, {name!r} leaves the range of {str(folded.dtype).removeprefix('torch.')}")
    return None


def _hooked(name: str, module: nn.Module) -> Kept | None:
    kinds = hooks_on(module)
    if kinds:
        return Kept("hook", f"{name!r} carries {kinds[0]}")
    if "forward" in vars(module):
        return Kept("hook", f"the forward of {name!r} was replaced on the instance")
    return None


def _destination(record: ForwardRecord, operation: Operation) -> str:
    readers = [reader for value in operation.outputs for reader in record.readers(value)]
    return str(readers[0]) if readers else "no recorded function"


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first and last byte of a tensor's memory."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + max(extent, 0) * tensor.element_size()


def _join(owner: str, key: str) -> str:
    return f"{owner}.{key}" if owner else key
