"""Which convolution, linear or BatchNorm layer can take up a scale and a shift; every guard names what it saw."""

from collections.abc import Collection

import torch
from torch import nn

from bn_lightning.folding.norms import Norm, join
from bn_lightning.folding.numbers import owned_tensor
from bn_lightning.folding.reasons import Kept
from bn_lightning.folding.scene import Scene
from bn_lightning.folding.steps import FoldTarget
from bn_lightning.tracing.record import ForwardRecord, Operation

__all__ = ["LAYER_KINDS", "layer_target", "norm_target", "require_sole_use"]

LAYER_KINDS = ("conv", "conv_transpose", "linear")


def layer_target(model: nn.Module, operation: Operation) -> FoldTarget | Kept:
    """Name the weight and bias of a convolution or linear layer as the model owns them."""
    assert operation.layer is not None
    owned: dict[str, str] = {}
    for role in ("weight", "bias"):
        names = operation.layer.tensors.get(role)
        if names == ():
            return Kept("parametrized", f"the {role} of {operation} is computed, not a parameter of the model")
        if names and len(names) > 1:
            return Kept("tied", f"the {role} of {operation} is both {names[0]!r} and {names[1]!r}")
        if names:
            owned[role] = names[0]
    if "weight" not in owned:
        return Kept("parametrized", f"{operation} has no weight that the model owns")
    owner = owned["weight"].rpartition(".")[0]
    module = model.get_submodule(owner)
    if "bias" not in owned:
        if "bias" not in operation.layer.tensors:
            return Kept("functional", f"{operation} is called without a bias, and takes no new one")
        if operation.module != owner:
            return Kept("functional", f"{operation} uses the weight of {owner!r} without a bias, and takes no new one")
        if module._parameters.get("bias", module) is not None:
            return Kept("subclass", f"{type(module).__name__} {owner!r} has no free bias to fold the shift into")
    return FoldTarget(
        layer=owner,
        weight=owned["weight"],
        bias=owned.get("bias", join(owner, "bias")),
        kind=operation.kind,
        groups=operation.layer.groups,
    )


def norm_target(model: nn.Module, norm: Norm) -> FoldTarget | Kept:
    """Name the weight and bias of a BatchNorm layer that stays."""
    if not norm.roles:
        return Kept("subclass", f"{norm.name!r} keeps its weights in a way of its own; revert_batch_norm first")
    module = model.get_submodule(norm.name)
    for role in ("weight", "bias"):
        if role not in norm.roles and (role not in module._parameters or module._parameters[role] is not None):
            return Kept("subclass", f"{type(module).__name__} {norm.name!r} has no {role} to fold into")
    return FoldTarget(norm.name, join(norm.name, "weight"), join(norm.name, "bias"), "batch_norm", norm=norm)


def require_sole_use(scene: Scene, target: FoldTarget, operations: Collection[int]) -> Kept | None:
    """Say who else uses the tensors that would be written; ``None`` if only the given operations do."""
    # A BatchNorm without weight and bias is known by its mean.
    for name in (*target.tensors, *([] if target.norm is None else [target.norm.roles["running_mean"]])):
        for reader in scene.record.tensor_readers(name):
            if reader.index not in operations:
                reused = reader.kind in LAYER_KINDS
                return Kept(
                    "reused" if reused else "tied",
                    f"{name!r} is also {'applied' if reused else 'read'} by {reader}"
                    + (f", whose output goes to {_destination(scene.record, reader)}" if reused else ""),
                )
        kernels = scene.record.unseen_tensors.get(name)
        if kernels:
            return Kept("opaque", f"{name!r} is read by {kernels[0]} in code that cannot be recorded")
        tensor = owned_tensor(scene.model, name)
        if tensor is not None and tensor.layout != torch.strided:
            return Kept("parametrized", f"{name!r} is sparse")
        if tensor is not None and any(
            n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            return Kept("tied", f"{name!r} is expanded: several of its elements lie in one place")
        shared = scene.sharing_memory(name)
        if shared:
            return Kept("tied", f"{name!r} lies in the same memory as {shared[0]!r}")
    module = scene.model.get_submodule(target.layer)
    if "forward" in vars(module):
        return Kept("hook", f"the forward of {target.layer!r} was replaced on the instance")
    return None


def _destination(record: ForwardRecord, operation: Operation) -> str:
    readers = [reader for value in operation.outputs for reader in record.readers(value)]
    return str(readers[0]) if readers else "no recorded function"
