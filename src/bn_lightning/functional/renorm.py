"""Batch Renormalization's correction of batch statistics towards running ones, and the schedule of its limits."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["ramp", "renorm_correction"]


def renorm_correction(
    batch_mean: Tensor,
    batch_var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    r_max: float | Tensor,
    d_max: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute r and d, which take a batch's normalized values to running statistics: ``x̂ · r + d``; both detached.

    With σ = √(variance + eps), r = clip(σ_batch / σ_running, 1/r_max, r_max) and
    d = clip((mean_batch − mean_running) / σ_running, −d_max, d_max). Unclipped, ``x̂ · r + d`` is x normalized by the
    running statistics; with r_max = 1 and d_max = 0 it is x̂.

    Args:
        batch_mean: (C,), activation units.
        batch_var: (C,), squared units, correction=0.
        running_mean: (C,), as it was before this step.
        running_var: (C,), likewise.
        eps: Added to both variances.
        r_max: At least 1.
        d_max: At least 0, in running standard deviations.

    Returns:
        r and d, (C,), of ``batch_mean``'s dtype or wider.

    Example:
        >>> four, one, zero = torch.full((1,), 4.0), torch.ones(1), torch.zeros(1)
        >>> renorm_correction(one, four, zero, one, 0.0, r_max=3.0, d_max=0.5)
        (tensor([2.]), tensor([0.5000]))

    Reference:
        Ioffe, arXiv:1702.03275, Alg. 1.
    """
    if torch.compiler.is_compiling():
        limits = (value if isinstance(value, Tensor) else batch_mean.new_tensor(value) for value in (r_max, d_max))
        return _opaque_correction(batch_mean, batch_var, running_mean, running_var, eps, *limits)
    return _correction(batch_mean, batch_var, running_mean, running_var, eps, r_max, d_max)


def ramp(step: Tensor, first: float, last: float, period: tuple[int, int] | None) -> Tensor:
    """Go from ``first`` to ``last`` in a straight line over a period of steps, and stay there.

    Args:
        step: How many steps there were before this one. Its floating dtype is the result's; counts give float32.
        first: The value up to the period's beginning.
        last: The value from its end on.
        period: Beginning and end in steps; one and the same is a jump, ``None`` is ``last`` from the start.

    Example:
        >>> ramp(torch.tensor([0, 5_000, 22_500, 90_000]), 1.0, 3.0, (5_000, 40_000))
        tensor([1., 1., 2., 3.])
    """
    step = step if step.is_floating_point() else step.to(torch.float32)
    if period is None:
        return torch.full_like(step, last)
    begin, end = period
    length = max(end - begin, 1)
    line = (step - (end - length)).mul_((last - first) / length).add_(first)
    return line.clamp_(min(first, last), max(first, last))


def _correction(
    batch_mean: Tensor, batch_var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, r_max: Any, d_max: Any
) -> tuple[Tensor, Tensor]:
    running_mean, running_var = (running.to(batch_mean.dtype) for running in (running_mean, running_var))
    inverse = torch.rsqrt(running_var + eps)
    r = (torch.sqrt(batch_var + eps) * inverse).clamp(r_max**-1, r_max)
    d = ((batch_mean - running_mean) * inverse).clamp(-d_max, d_max)
    return r.detach(), d.detach()


@torch.library.custom_op("bn_lightning::renorm_correction", mutates_args=())
def _opaque_correction(
    batch_mean: Tensor,
    batch_var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    r_max: Tensor,
    d_max: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keep the arithmetic out of the compiler's sight.

    What it sees, it computes again in the backward pass, from running statistics that have moved by then, and the
    gradients of scale and input come out wrong without a word (pytorch#197039, torch 2.13).
    """
    return _correction(batch_mean, batch_var, running_mean, running_var, eps, r_max, d_max)


@_opaque_correction.register_fake
def _(batch_mean: Tensor, batch_var: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(batch_mean), torch.empty_like(batch_var)
