"""Write folds into a model, each with its way back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bn_lightning.folding.arithmetic import folded_tensors, owned_tensor
from bn_lightning.folding.report import FoldPair
from bn_lightning.preservation import out_of_inference_mode

__all__ = ["Surgery"]


class Surgery:
    """The folds applied to one model.

    Every step back is noted before the step itself is taken, so that `undo` is right after an interrupt at any
    point. Weights are written in place: optimizers and wrappers hold the Parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._ways_back: dict[FoldPair, list[Callable[[], object]]] = {}
        # The same one every time: a hook on it outlives `FoldResult.unfolded`.
        self._stand_ins: dict[FoldPair, nn.Identity] = {}

    @property
    def pairs(self) -> tuple[FoldPair, ...]:
        """What is folded at present."""
        return tuple(self._ways_back)

    def is_folded(self, pair: FoldPair) -> bool:
        """Tell whether a pair is folded at present."""
        return pair in self._ways_back

    def fold(self, pair: FoldPair) -> None:
        """Fold one pair; its BatchNorm layer becomes ``torch.nn.Identity`` wherever it is registered."""
        with out_of_inference_mode():
            folded = folded_tensors(self.model, pair)
            back = self._ways_back.setdefault(pair, [])
            for name, value in zip((pair.weight, pair.bias), folded, strict=True):
                self._write(name, value, back, trainable=_trainable(owned_tensor(self.model, pair.weight)))
            bn = self.model.get_submodule(pair.batch_norm)
            identity = self._stand_ins.setdefault(pair, nn.Identity()).train(bn.training)
            back.append(_follower(bn, identity, self.model, pair.weight))
            for parent in list(self.model.modules()):
                for key, child in list(parent._modules.items()):
                    if child is bn:
                        back.append(_slot_restorer(parent, key, bn))
                        parent._modules[key] = identity

    def unfold(self, pair: FoldPair) -> None:
        """Take one fold back, bit for bit."""
        with out_of_inference_mode():
            for step in reversed(self._ways_back.get(pair, [])):
                step()
        self._ways_back.pop(pair, None)

    def undo(self) -> None:
        """Take every fold back, bit for bit; again is harmless."""
        for pair in reversed(self.pairs):
            self.unfold(pair)

    def _write(self, name: str, value: Tensor, back: list[Callable[[], object]], *, trainable: bool) -> None:
        owner, _, key = name.rpartition(".")
        module, tensor = self.model.get_submodule(owner), owned_tensor(self.model, name)
        back.append(_tensor_restorer(module, key, tensor))
        if tensor is None:
            setattr(module, key, nn.Parameter(value, requires_grad=trainable))
        else:
            tensor.data.copy_(value)


def _trainable(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad


def _tensor_restorer(module: nn.Module, key: str, tensor: Tensor | None) -> Callable[[], object]:
    stash = None if tensor is None else tensor.detach().clone(memory_format=torch.preserve_format)

    def restore() -> None:
        if tensor is not None and stash is not None:
            tensor.data.copy_(stash)
        setattr(module, key, tensor)

    return restore


def _follower(bn: nn.Module, identity: nn.Module, model: nn.Module, weight: str) -> Callable[[], object]:
    """Make the layer follow what happened to the model meanwhile: ``.train()``, ``.to()``, ``.half()``."""
    before = owned_tensor(model, weight)
    assert before is not None
    device, dtype = before.device, before.dtype

    def follow() -> None:
        bn.training = identity.training
        now = owned_tensor(model, weight)
        assert now is not None
        if now.device != device:
            bn.to(now.device)
        if now.dtype != dtype:
            bn.to(now.dtype)

    return follow


def _slot_restorer(parent: nn.Module, key: str, child: nn.Module) -> Callable[[], object]:
    return lambda: parent._modules.__setitem__(key, child)
