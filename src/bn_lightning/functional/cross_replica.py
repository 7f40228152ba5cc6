"""Normalization by the statistics of all processes' batches together, differentiable through their exchange."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from bn_lightning.functional.moments import accumulation_dtype
from bn_lightning.functional.normalize import _backward, _evaluated, _like, channel_statistics

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

__all__ = ["gathered", "pool_variances", "replica_normalize", "replica_statistics"]


def pool_variances(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge mean and variance (correction=0) of disjoint samples, of whatever sizes: (count, mean, variance).

    This is Chan's formula divided by the count, and with counts of 1 the law of total variance for distributions that
    weigh alike. Samples without values are neutral; where all are, mean and variance are NaN.

    Args:
        counts: How many values each sample has.
        means: Activation units.
        variances: About the sample's own mean, squared units.

    Shape:
        ``means``, ``variances``: (W, *). ``counts``: what broadcasts to it. Results: the same without W.

    Example:
        >>> pool_variances(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1))
        (tensor([4.]), tensor([3.]), tensor([3.]))

    Reference:
        Chan, Golub & LeVeque, The American Statistician 37(3), 1983, eq. 2.1.
    """
    count = counts.sum(0)
    share = counts / count
    mean = (share * means).sum(0)
    return count, mean, (share * (variances + (means - mean).square())).sum(0)


def gathered(values: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    """Return every process's values, in the order of ranks and bit for bit the same everywhere.

    Args:
        values: This process's; of one shape and dtype in all of them.
        group: The processes; ``None`` for all.

    Shape:
        ``values``: (*). Result: (W, *) for W processes.
    """
    table = values.new_zeros(distributed.get_world_size(group), *values.shape)
    table[distributed.get_rank(group)] = values
    # A sum with zeros is exact, and the one collective without lists that both gloo and NCCL have.
    distributed.all_reduce(table, group=group)
    return table


@torch.no_grad()
def replica_statistics(x: Tensor, group: "ProcessGroup | None" = None) -> tuple[Tensor, Tensor, Tensor]:
    """Measure each channel over the batches of all processes, in one collective: (count, mean, variance, correction=0).

    Batches may differ in size, and be empty in some of the processes; without a value in any, the results are NaN.

    Args:
        x: This process's batch.
        group: The processes; ``None`` for all.

    Returns:
        On the device of ``x``, without gradient: the count of values a channel has, a scalar of `accumulation_dtype`;
        mean and variance in the dtype of ``x``, or float32 if that is narrower.

    Shape:
        ``x``: (N, C, *). Results: (), (C,), (C,).
    """
    channels = x.shape[1]
    number = x.numel() // max(channels, 1)
    count = torch.full((1,), number, dtype=accumulation_dtype(x.device), device=x.device)
    # Joined to the count, float32 statistics become as wide; no values leave zeros, neutral beside a count of 0.
    own = torch.cat([*channel_statistics(x), count]) if number else count.new_zeros(2 * channels + 1)
    means, variances, counts = gathered(own, group).split([channels, channels, 1], dim=1)
    total, mean, var = pool_variances(counts, means, variances)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return total[0], mean.to(dtype), var.to(dtype)


def replica_normalize(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    """Compute ``(x - mean) / sqrt(var + eps) * weight + bias`` where ``mean`` and ``var`` are all processes' together.

    The gradient for ``x`` is that of the sum of all processes' losses, through the statistics too, and takes one
    collective: every process has to run backward. ``weight`` and ``bias`` have to be the same in all of them; their
    gradients are this process's own sums, as in ``torch.nn.SyncBatchNorm``, because DDP averages those. There are no
    second derivatives.

    Args:
        x: This process's batch, possibly empty.
        count: As `replica_statistics` gives it.
        mean: Likewise.
        var: Likewise, correction=0.
        weight: (C,), or ``None`` for ones. May depend on the statistics behind a ``detach``, as may ``bias``.
        bias: (C,), or ``None`` for zeros.
        eps: Added to the variance.
        group: The processes; ``None`` for all.

    Shape:
        ``x``: (N, C, *), of any memory format, which the result keeps.

    Reference:
        Ioffe & Szegedy, arXiv:1502.03167, the gradients of §3, sums taken over all processes.
    """
    return _ReplicaNormalize.apply(x, count, mean, var, _like(weight, mean), _like(bias, mean), eps, group)


class _ReplicaNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        count: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: "ProcessGroup | None",
    ) -> Tensor:
        ctx.save_for_backward(x, count, mean, var, weight)
        ctx.eps, ctx.group = eps, group
        return _evaluated(x, mean, var, weight, bias, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, count, mean, var, weight = ctx.saved_tensors
        to_x, _, _, _, to_weight, to_bias, _, _ = ctx.needs_input_grad
        scaled, total = _sums(grad, x, weight, mean, var, ctx.eps)
        grad_x = None
        if to_x:
            sums = torch.stack([scaled, total])
            distributed.all_reduce(sums, group=ctx.group)
            grad_x = _through_statistics(grad, x, sums / count, mean, var, weight, ctx.eps)
        return grad_x, None, None, None, scaled if to_weight else None, total if to_bias else None, None, None


def _sums(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return Σ grad·x̂ and Σ grad over this process's batch, as BN's backward kernel adds them."""
    _, scaled, total = _backward(grad, x, weight, mean, var, eps, [False, True, True], own=False)
    assert scaled is not None
    assert total is not None
    return scaled.to(mean.dtype), total.to(mean.dtype)


def _through_statistics(
    grad: Tensor, x: Tensor, averages: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """Return the gradient for x: (grad − average of grad − x̂ · average of grad·x̂) · weight / √(var + eps)."""
    gain = torch.rsqrt(var + eps)
    if weight is not None:
        gain = gain * weight
    scaled, total = -gain * averages
    # What depends on x is an affine map of each channel: BN's evaluation kernel does it in one pass.
    affine = _evaluated(x, mean, var, scaled, total, eps)
    return affine.addcmul_(grad, gain.view(-1, *[1] * (x.dim() - 2)))
