"""Normalization by given or own statistics, on BN's own kernels, differentiable in all that it is given.

Written out in tensor operations the same costs four times as much and keeps two more activations.
``torch.compile(fullgraph=True)`` takes them all; second derivatives do not go through the statistics that `normalize`
is given.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["batch_norm_with_statistics", "batch_normalize", "channel_statistics", "normalize"]


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Measure each channel's mean and variance (correction=0) in one batch; gradients flow through both.

    Half precision is measured in float32. As accurate as torch's own BN, whose kernel it is: see `batch_moments` for
    statistics that stay exact at a large mean in every memory format.

    Shape:
        ``x``: (N, C, *). Results: (C,).

    Example:
        >>> channel_statistics(torch.tensor([[1.0], [3.0]]))
        (tensor([2.]), tensor([1.]))
    """
    return _ChannelStatistics.apply(x) if x.requires_grad else _measured(x)


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute ``(x - mean) / sqrt(var + eps) * weight + bias``; gradients flow to all five tensors.

    Args:
        x: (N, C, *), of any memory format, which the result keeps.
        mean: (C,), float32 for half-precision ``x``, else of its dtype.
        var: (C,), likewise.
        weight: (C,), or ``None`` for ones.
        bias: (C,), or ``None`` for zeros.
        eps: Added to the variance.

    Example:
        >>> normalize(torch.tensor([[5.0]]), torch.ones(1), torch.full((1,), 4.0), None, None, 0.0)
        tensor([[2.]])
    """
    return _Normalize.apply(x, mean, var, _like(weight, mean), _like(bias, mean), eps)


def batch_normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Compute what `normalize` does where ``mean`` and ``var`` are ``x``'s own, in one backward kernel.

    The gradient for ``x`` includes the way through its statistics; ``mean`` and ``var`` themselves get none. ``weight``
    and ``bias`` may depend on the statistics, as in Batch Renormalization, if they do so behind a ``detach``.

    Shape:
        As in `normalize`.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_normalize(x, *channel_statistics(x), None, None, 0.0)
        tensor([[-1.],
                [ 1.]])

    Reference:
        Ioffe & Szegedy, arXiv:1502.03167, Alg. 1 and the gradients of §3.
    """
    return _BatchNormalize.apply(x, mean.detach(), var.detach(), _like(weight, mean), _like(bias, mean), eps)


def batch_norm_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by torch's own BN, and return also the statistics it used: (y, mean, variance with correction=1).

    Shape:
        ``x``: (N, C, *). Results: as ``x``, (C,), (C,).

    Example:
        >>> batch_norm_with_statistics(torch.tensor([[1.0], [3.0]]), None, None, 1e-5)[2]
        tensor([2.])
    """
    parameter = weight if weight is not None else bias
    wide = torch.promote_types(x.dtype, torch.float32)
    # With momentum 1 the kernel leaves the batch's own statistics in the buffers it is given.
    mean, var = torch.zeros(
        2, x.shape[1], dtype=wide if parameter is None else parameter.dtype, device=x.device
    ).unbind()
    return F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps), mean, var


class _ChannelStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _measured(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // max(x.shape[1], 1)
        # dx = grad_mean/n + 2·grad_var·(x − mean)/n, an affine map of each channel: BN's evaluation kernel does it in
        # one pass, with variance 1 and no eps.
        return _evaluated(x, mean, torch.ones_like(mean), grad_var * (2 / count), grad_mean / count, 0.0)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        # A frozen layer needs no x to go back, and saves its memory.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4]) else None, mean, var, weight)
        ctx.eps = eps
        return _evaluated(x, mean, var, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight = ctx.saved_tensors
        to_x, to_mean, to_var, to_weight, to_bias, _ = ctx.needs_input_grad
        wanted = [to_x, to_var or to_weight, to_mean or to_bias]
        grad_x, scaled, total = _backward(grad, grad if x is None else x, weight, mean, var, ctx.eps, wanted, own=False)
        inverse = torch.rsqrt(var + ctx.eps)
        gain = inverse if weight is None else inverse * weight
        return (
            grad_x,
            -gain * total if to_mean and total is not None else None,
            -0.5 * gain * inverse * scaled if to_var and scaled is not None else None,
            scaled if to_weight else None,
            total if to_bias else None,
            None,
        )


class _BatchNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        return _evaluated(x, mean, var, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight = ctx.saved_tensors
        to_x, _, _, to_weight, to_bias, _ = ctx.needs_input_grad
        grads = _backward(grad, x, weight, mean, var, ctx.eps, [to_x, to_weight, to_bias], own=True)
        return grads[0], None, None, grads[1], grads[2], None


def _measured(x: Tensor) -> tuple[Tensor, Tensor]:
    # A compiler makes a kernel of its own, and cannot run this one with a batch size that varies.
    if x.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        var, mean = torch.var_mean(
            x.float() if x.element_size() < 4 else x, [axis for axis in range(x.dim()) if axis != 1], correction=0
        )
        return mean, var
    if x.element_size() >= 4:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:  # without float32 buffers to update, the kernel rounds its results to half precision
        scratch = x.new_zeros(x.shape[1], dtype=torch.float32)
        mean, var = torch.batch_norm_update_stats(x, scratch, scratch.clone(), 0.0)
    return mean, var


def _evaluated(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    mask: list[bool],
    *,
    own: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradient for x, Σ grad·x̂ and Σ grad; with ``own`` the first goes through x's statistics too."""
    if not x.numel():  # on which the kernel kills the process
        return torch.zeros_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, var, mean, torch.rsqrt(var + eps), own, eps, mask
    )
    return grads


def _like(parameter: Tensor | None, statistic: Tensor) -> Tensor | None:
    """Take a half-precision parameter to the statistics' dtype: the kernels refuse the mixture."""
    return None if parameter is None else parameter.to(statistic.dtype)
