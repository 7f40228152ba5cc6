"""The folded weight and bias of one pair, computed in float64 and cast once."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.folding.report import FoldPair
from bn_lightning.functional.affine import eval_affine, fold_conv_weights, fold_linear_weights

__all__ = ["exact", "folded_tensors", "owned_tensor", "scale_and_shift"]


def exact(tensor: Tensor) -> Tensor:
    """Return a float64 tensor, on the CPU where the device has no float64 (MPS)."""
    detached = tensor.detach()
    return (detached.cpu() if detached.device.type == "mps" else detached).double()


def owned_tensor(model: nn.Module, name: str) -> Tensor | None:
    """Look up a parameter or buffer by its qualified name."""
    owner, _, key = name.rpartition(".")
    tensor: Tensor | None = getattr(model.get_submodule(owner), key)
    return tensor


def scale_and_shift(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Rewrite an evaluation-mode layer as ``scale * x + shift``, in float64.

    Shape:
        Both (C,).
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    weight, bias = bn.weight, bn.bias  # typed as tensors by torch, but None without affine
    return eval_affine(
        exact(bn.running_mean),
        exact(bn.running_var),
        bn.eps,
        None if weight is None else exact(weight),
        None if bias is None else exact(bias),
    )


def folded_tensors(model: nn.Module, pair: FoldPair) -> tuple[Tensor, Tensor]:
    """Compute what the pair's weight and bias become; nothing is written.

    Returns:
        The weight, in the old one's dtype, device and memory format, and the bias, (C_out,).
    """
    bn = model.get_submodule(pair.batch_norm)
    weight, bias = owned_tensor(model, pair.weight), owned_tensor(model, pair.bias)
    assert isinstance(bn, _BatchNorm)
    assert weight is not None
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    scale, shift = (tensor.to(device) for tensor in scale_and_shift(bn))
    source, offset = weight.detach().to(device), None if bias is None else bias.detach().to(device)
    if pair.kind == "linear":
        folded, new_bias = fold_linear_weights(source, offset, scale, shift)
    else:
        folded, new_bias = fold_conv_weights(
            source, offset, scale, shift, groups=pair.groups, transposed=pair.kind == "conv_transpose"
        )
    return folded.to(weight.device), new_bias.to(weight.device)
