"""Run a network and compare what it returns; on its own, since it checks the library's own comparison."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["outputs", "relative_error", "unfit"]


def outputs(network: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
    """Return all floating-point tensors of the output, as float64 copies."""
    with torch.no_grad():
        leaves = tree_leaves(network(images.clone()))
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.detach().to(torch.float64, copy=True) for leaf in floats]


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Compute max|found - exact| / max|exact|, the largest over the tensors; infinite if they do not compare."""
    if not exact or [each.shape for each in found] != [each.shape for each in exact]:
        return math.inf
    worst = 0.0
    for one, other in zip(found, exact, strict=True):
        if not other.numel():
            return math.inf
        error, size = float((one - other).abs().max()), float(other.abs().max())
        if not math.isfinite(error):  # nan would win no comparison
            return math.inf
        worst = max(worst, error / size if size else math.inf)
    return worst


def unfit(exact: Sequence[Tensor]) -> str:
    """Say why another run's equal outputs would prove nothing, of a batch of two images; empty if they would."""
    if not exact or not all(each.numel() for each in exact):
        return "an output to compare is empty"
    if not all(each.isfinite().all() for each in exact):
        return "an output is not finite"
    if not any((each[0] - each[-1]).abs().max() > 1e-6 * each.abs().max() for each in exact):
        return "the output does not depend on the input"
    return ""
