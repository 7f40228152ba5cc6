"""Write folds into a model, with the way back."""

from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from bn_lightning.errors import FoldError
from bn_lightning.folding.numbers import Numbers, owned_tensor, reference_tensor
from bn_lightning.folding.steps import FoldStep
from bn_lightning.internals import WeakTensorDictionary
from bn_lightning.layers.channel_affine import ChannelAffine
from bn_lightning.preservation import out_of_inference_mode

__all__ = ["Surgery"]

# Of each tensor the folds that wrote to it and stand, oldest first. Tokens, since a Surgery keeps its network alive.
_FOLDS: MutableMapping[Tensor, list[object]] = WeakTensorDictionary()


@dataclass(frozen=True, slots=True)
class _Written:
    """A tensor that a fold wrote to, where it was, and what it was then."""

    name: str
    module: nn.Module
    key: str
    tensor: Tensor
    version: int
    dtype: torch.dtype
    device: torch.device

    @property
    def is_of_another_kind(self) -> bool:
        """Whether it was cast or moved since."""
        return (self.tensor.dtype, self.tensor.device) != (self.dtype, self.device)


class Surgery:
    """The folds applied to one model.

    Every step back is noted before the step itself is taken, so that `undo` is right after an interrupt at any
    point. Weights are written in place: optimizers and wrappers hold the Parameter.

    Attributes:
        model: The network.
        steps: What is folded at present.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: tuple[FoldStep, ...] = ()
        self._way_back: list[Callable[[], object]] = []
        self._token = object()
        self._written: list[_Written] = []
        # The same ones every time: a hook on one outlives `FoldResult.unfolded`, and optimizers hold parameters.
        self._stand_ins: dict[str, nn.Module] = {}
        self._new_parameters: dict[str, nn.Parameter] = {}

    @property
    def is_folded(self) -> bool:
        """Whether anything is folded at present."""
        return bool(self.steps)

    def fold(self, steps: Sequence[FoldStep]) -> None:
        """Fold an unfolded model; where a layer was stands what is left of it.

        Raises:
            FoldError: If the model's numbers do not allow a step, which they did when it was planned.
        """
        assert not self._way_back, "undo first"
        with out_of_inference_mode():
            numbers = Numbers(self.model)
            for step in steps:
                kept = numbers.apply(step)
                if kept is not None:
                    raise FoldError(
                        f"{step.name!r} can no longer be folded into {step.into}: {kept.detail}. Fold the model anew, "
                        "so that it is planned with its present numbers."
                    )
            written = {target.layer: target for step in steps for target in step.targets}
            affines = {step.name: numbers.affine(step.norm) for step in steps if not step.targets}
            self.steps = tuple(steps)
            for target in written.values():
                like = reference_tensor(self.model, target)
                for name in target.tensors:
                    self._write(name, numbers.changed[name], like)
            for step in steps:
                self._replace(step, affines.get(step.name))
        torch.clear_autocast_cache()  # it holds casts of the weights as they were

    def undo(self) -> None:
        """Take every fold back, bit for bit; again is harmless."""
        with out_of_inference_mode():
            while self._way_back:
                self._way_back[-1]()
                self._way_back.pop()
        torch.clear_autocast_cache()
        for each in self._written:
            folds = _FOLDS.get(each.tensor, [])
            if self._token in folds:  # an interrupt may have come between the two notes
                folds.remove(self._token)
        self.steps, self._written = (), []

    def require_undoable(self) -> None:
        """Refuse to take this fold back under a later one, or into weights that are no parameters any more.

        Raises:
            FoldError: If there is such a fold or weight.
        """
        for each in self._written:
            if each.key not in each.module._parameters and each.key not in each.module._buffers:
                raise FoldError(
                    f"{each.name!r} is no parameter any more since the fold (parametrized, pruned?), and cannot be put "
                    "back. Take that away first."
                )
            if _FOLDS[each.tensor][-1] is not self._token:
                raise FoldError(
                    f"another fold came after this one and stands on the {each.name!r} that this one made. Undo "
                    "the later fold first."
                )

    def require_unchanged(self) -> None:
        """Refuse to unfold for a while what has other weights than it was given; they would be lost.

        Its weights are folded again and compared bit by bit. A version would tell nothing: fused optimizers and writes
        to ``.data`` count none. After a cast or a move the comparison would, so there the version has to do.

        Raises:
            FoldError: If a folded weight was written to, naming it.
        """
        self.require_in_place()
        steps, affines = self.steps, self._affine_tensors()
        for each in self._written:
            if each.is_of_another_kind and _version(each.tensor) != each.version:
                raise _changed(each.name)
        compared = {each.name: each.tensor for each in self._written if not each.is_of_another_kind} | affines
        learned = {name: tensor.detach().clone() for name, tensor in compared.items()}
        self.undo()
        self.fold(steps)
        different = [name for name, tensor in compared.items() if not _same(tensor, learned[name])]
        if different:
            with out_of_inference_mode():
                for name in different:
                    _overwrite(compared[name], learned[name])
            raise _changed(different[0])

    def require_in_place(self) -> None:
        """Refuse to fold again, by name, what is no longer what was folded.

        Raises:
            FoldError: If a weight, or what stands where a layer was, was replaced, naming it.
        """
        for each in self._written:
            if owned_tensor(self.model, each.name) is not each.tensor:
                raise _replaced(each.name)
        for step in self.steps:
            if self.model.get_submodule(step.name) is not self._stand_ins[step.name]:
                raise _replaced(step.name)

    def _affine_tensors(self) -> dict[str, Tensor]:
        """Name the scale and shift of each layer that is left as one."""
        layers = {step.name: _scale_and_shift(self._stand_ins[step.name]) for step in self.steps if not step.targets}
        return {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.named_parameters()}

    def __reduce__(self) -> NoReturn:
        raise FoldError(
            "the way back belongs to the very network that was folded, and cannot be copied with it. Copy "
            "result.model, or fold a copy (inplace=False)."
        )

    def _write(self, name: str, value: Tensor, like: Tensor) -> None:
        owner, _, key = name.rpartition(".")
        module, tensor = self.model.get_submodule(owner), owned_tensor(self.model, name)
        self._way_back.append(_tensor_restorer(module, key, tensor))
        if tensor is None:
            tensor = self._new_parameters.setdefault(name, nn.Parameter(torch.empty(0)))
            tensor.data = value.to(like.device, like.dtype)
            tensor.requires_grad_(like.requires_grad)
            setattr(module, key, tensor)
        else:
            _overwrite(tensor, value)
        self._written.append(_Written(name, module, key, tensor, _version(tensor), tensor.dtype, tensor.device))
        _FOLDS.setdefault(tensor, []).append(self._token)

    def _replace(self, step: FoldStep, affine: tuple[Tensor, Tensor] | None) -> None:
        layer = self.model.get_submodule(step.name)
        stand_in = self._stand_ins.get(step.name)
        if stand_in is None:
            stand_in = self._stand_ins[step.name] = _stand_in(layer, step.norm.tail, affine)
        stand_in.training = layer.training
        if affine is None:
            like = partial(reference_tensor, self.model, step.targets[0])
        else:
            scale_and_shift = _scale_and_shift(stand_in)
            _set_affine(scale_and_shift, layer, affine)
            like = partial(getattr, scale_and_shift, "scale")
        self._way_back.append(_follower(layer, stand_in, like))
        for parent in list(self.model.modules()):
            for key, child in list(parent._modules.items()):
                if child is layer:
                    self._way_back.append(partial(_put, parent, key, layer))
                    _put(parent, key, stand_in)


def _stand_in(layer: nn.Module, tail: Sequence[str], affine: tuple[Tensor, Tensor] | None) -> nn.Module:
    """Make what stays where a layer was: nothing, or the children that run behind it, or scale and shift."""
    children = [(key, layer.get_submodule(key)) for key in tail]
    scale_and_shift = None if affine is None else ChannelAffine(len(affine[0]))
    if not children:
        return nn.Identity() if scale_and_shift is None else scale_and_shift
    own: list[tuple[str, nn.Module]] = [] if scale_and_shift is None else [("affine", scale_and_shift)]
    return nn.Sequential(OrderedDict([*own, *children]))


def _put(parent: nn.Module, key: str, child: nn.Module) -> None:
    parent._modules[key] = child  # looked up at the time: ``del sequential[3]`` makes a new dict


def _scale_and_shift(stand_in: nn.Module) -> ChannelAffine:
    found = stand_in if isinstance(stand_in, ChannelAffine) else stand_in.get_submodule("affine")
    assert isinstance(found, ChannelAffine)
    return found


def _set_affine(scale_and_shift: ChannelAffine, layer: nn.Module, affine: tuple[Tensor, Tensor]) -> None:
    # A layer whose statistics are float32 among half-precision ones computes in float32, and so does this.
    like = next(tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor.is_floating_point())
    trainable = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    scale_and_shift.training = layer.training
    for key, value in zip(("scale", "shift"), affine, strict=True):
        held = getattr(scale_and_shift, key)
        held.data = value.to(like.device, like.dtype)
        held.requires_grad_(trainable)


def _overwrite(tensor: Tensor, value: Tensor) -> None:
    # With its version counted on, so that a backward pass that still needs the old value says so.
    (tensor.data if tensor.is_inference() else tensor).copy_(value)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last place, which the order of a sum may turn."""
    return bool(((one - other).abs() <= torch.finfo(one.dtype).eps * other.abs()).all())


def _changed(name: str) -> FoldError:
    return FoldError(
        f"{name!r} was changed since it was folded (by training, or by loading weights), and unfolding would lose "
        "that. Keep the folded network as it is, or take the fold back with undo()."
    )


def _replaced(name: str) -> FoldError:
    return FoldError(
        f"{name!r} was replaced since it was folded, and to fold again would overwrite what is there now. Keep the "
        "network as it is, or take the fold back with undo() and fold anew."
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _tensor_restorer(module: nn.Module, key: str, tensor: Tensor | None) -> Callable[[], object]:
    stash = None if tensor is None else tensor.detach().clone(memory_format=torch.preserve_format)

    def restore() -> None:
        if tensor is not None and stash is not None:
            _overwrite(tensor, stash)
        setattr(module, key, tensor)

    return restore


def _follower(layer: nn.Module, stand_in: nn.Module, like: Callable[[], Tensor]) -> Callable[[], object]:
    """Make the layer follow what happened to the model meanwhile: ``.train()``, ``.to()``, ``.half()``."""
    device, dtype = like().device, like().dtype

    def follow() -> None:
        layer.training = stand_in.training
        now = like()
        if now.device != device:
            layer.to(now.device)
        if now.dtype != dtype:
            layer.to(now.dtype)

    return follow
