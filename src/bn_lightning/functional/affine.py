"""Evaluation-mode BN as ``scale * x + shift``, and what folding that into a weight comes to."""

import torch
from torch import Tensor

__all__ = [
    "absorb_into_conv_weights",
    "absorb_into_linear_weights",
    "eval_affine",
    "fold_conv_weights",
    "fold_linear_weights",
]


def eval_affine(
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewrite evaluation-mode BN as ``scale * x + shift``; ``None`` means no weight or bias.

    Computed in the inputs' own dtype: pass float64 for an exact fold.

    Shape:
        All tensors: (C,).

    Example:
        >>> scale, shift = eval_affine(torch.ones(1), torch.full((1,), 4.0), 0.0)
        >>> scale, shift
        (tensor([0.5000]), tensor([-0.5000]))

    Reference:
        Ioffe & Szegedy, arXiv:1502.03167, Alg. 2, line 11.
    """
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return scale, shift if bias is None else shift + bias


def fold_conv_weights(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fold ``scale * conv(x) + shift`` into the convolution's weight and bias.

    The arithmetic runs in the dtype of ``scale`` (pass float64) and is cast once to the weight's.

    Args:
        weight: (C_out, C_in / groups, *), or (C_in, C_out / groups, *) when ``transposed``.
        bias: (C_out,), or ``None`` for zero.
        scale: (C_out,).
        shift: (C_out,).
        groups: The convolution's groups.
        transposed: Whether the weight belongs to a transposed convolution.

    Returns:
        The new weight, in the old one's dtype and memory format, and the new bias, (C_out,).

    Example:
        >>> weight, bias = fold_conv_weights(torch.ones(1, 1, 1), None, torch.tensor([2.0]), torch.tensor([3.0]))
        >>> weight.item(), bias.item()
        (2.0, 3.0)

    See Also:
        ``torch.nn.utils.fuse_conv_bn_weights``, which raises for grouped transposed convolutions.
    """
    trailing = (1,) * (weight.dim() - 2)
    if transposed:
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
        # Output channel g·outputs + o lives in rows g·inputs … of column o: never match axes by size.
        factor = scale.view(groups, 1, outputs).expand(groups, inputs, outputs)
        factor = factor.reshape(groups * inputs, outputs, *trailing)
    else:
        factor = scale.view(-1, 1, *trailing)
    return (weight.to(scale.dtype) * factor).to(weight.dtype), _fold_bias(weight, bias, scale, shift)


def fold_linear_weights(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Fold ``scale * linear(x) + shift`` into the linear layer's weight and bias.

    The arithmetic runs in the dtype of ``scale`` (pass float64) and is cast once to the weight's.

    Shape:
        ``weight``: (C_out, C_in). Everything else: (C_out,).

    Example:
        >>> fold_linear_weights(torch.ones(1, 2), None, torch.tensor([2.0]), torch.tensor([3.0]))
        (tensor([[2., 2.]]), tensor([3.]))

    See Also:
        ``torch.nn.utils.fuse_linear_bn_weights``.
    """
    return (weight.to(scale.dtype) * scale[:, None]).to(weight.dtype), _fold_bias(weight, bias, scale, shift)


def absorb_into_conv_weights(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fold ``conv(scale * x + shift)`` into the convolution's weight and bias.

    Exact where the convolution takes in nothing but values of ``x``: not across zero padding unless the shift is zero.

    Args:
        weight: (C_out, C_in / groups, *), or (C_in, C_out / groups, *) when ``transposed``.
        bias: (C_out,), or ``None`` for zero.
        scale: (C_in,).
        shift: (C_in,).
        groups: The convolution's groups.
        transposed: Whether the weight belongs to a transposed convolution.

    Returns:
        The new weight and the new bias, (C_out,), in the weight's dtype and memory format.

    Example:
        >>> scale, shift = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 0.0])
        >>> weight, bias = absorb_into_conv_weights(torch.ones(1, 2, 1), None, scale, shift)
        >>> weight.flatten(), bias
        (tensor([2., 1.]), tensor([3.]))
    """
    trailing = (1,) * (weight.dim() - 2)
    exact = weight.to(scale.dtype)
    if transposed:
        factor = scale.view(-1, 1, *trailing)
        # Input channel g·inputs + i adds to the outputs of its own group g.
        added = (exact.flatten(2).sum(2) * shift[:, None]).view(groups, -1, weight.shape[1]).sum(1).flatten()
    else:
        outputs, inputs = weight.shape[0] // groups, weight.shape[1]
        factor, offset = (
            value.view(groups, 1, inputs).expand(groups, outputs, inputs).reshape(groups * outputs, inputs)
            for value in (scale, shift)
        )
        added = (exact.flatten(2).sum(2) * offset).sum(1)
        factor = factor.view(*factor.shape, *trailing)
    new_bias = added if bias is None else bias.to(scale.dtype) + added
    return (exact * factor).to(weight.dtype), new_bias.to(weight.dtype)


def absorb_into_linear_weights(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Fold ``linear(scale * x + shift)`` into the linear layer's weight and bias.

    Shape:
        ``weight``: (C_out, C_in). ``scale``, ``shift``: (C_in,). ``bias`` and the new bias: (C_out,).

    Example:
        >>> absorb_into_linear_weights(torch.ones(1, 2), None, torch.tensor([2.0, 1.0]), torch.tensor([3.0, 0.0]))
        (tensor([[2., 1.]]), tensor([3.]))
    """
    exact = weight.to(scale.dtype)
    added = exact @ shift
    new_bias = added if bias is None else bias.to(scale.dtype) + added
    return (exact * scale).to(weight.dtype), new_bias.to(weight.dtype)


def _fold_bias(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    return (shift if bias is None else scale * bias.to(scale.dtype) + shift).to(weight.dtype)
