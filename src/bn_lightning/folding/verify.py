"""Compare a model's outputs before and after folding, in float64 and in its own dtype."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bn_lightning.errors import FoldError
from bn_lightning.folding.numbers import exact
from bn_lightning.preservation import preserved
from bn_lightning.tracing.calls import ExampleCall
from bn_lightning.tracing.nested import iter_tensors

__all__ = ["comparison_problem", "difference_and_size", "float_outputs", "relative_error"]


def float_outputs(model: nn.Module, calls: Sequence[ExampleCall], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Run every call and return its floating-point outputs, however nested, as float64 copies.

    The model is given back after each call: every run starts from the same buffers and random state.

    Args:
        model: The network.
        calls: Its inputs, cloned for each run.
        dtype: What floating-point inputs are cast to. With float64, casts inside the model to a narrower float
            become casts to float64 too.
    """
    outputs = []
    for call in calls:
        with preserved(model), _WidenedCasts() if dtype == torch.float64 else nullcontext():
            result = call.copied(dtype).run(model, error=FoldError)
            outputs += [exact(tensor).clone() for tensor in iter_tensors(result) if tensor.is_floating_point()]
    return outputs


def comparison_problem(reference: Sequence[Tensor]) -> str | None:
    """Say why outputs prove nothing if another run equals them; ``None`` if they are fit for a comparison."""
    if not any(tensor.numel() for tensor in reference):
        return "the model returned no floating-point values to compare"
    finite = [tensor[tensor.isfinite()] for tensor in reference]
    if not any(tensor.numel() for tensor in finite):
        return "the unfolded model's own output is nan or inf throughout for these example inputs"
    if not any(tensor.any() for tensor in finite):
        return "the unfolded model's output is zero throughout for these example inputs, which proves nothing"
    return None


def relative_error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Compute max|found - reference| / max|reference| of each pair of tensors, and return the largest.

    Where the reference is nan or inf (a masked logit, say), the other has to be the very same. Outputs that differ in
    number or shape are infinitely wrong.

    Example:
        >>> relative_error([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 4.0])])
        0.25
    """
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in reference]:
        return math.inf
    errors = [_tensor_error(a, b) for a, b in zip(found, reference, strict=True) if b.numel()]
    return max(errors, default=math.inf)


def difference_and_size(found: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return max|found - reference|, and max|reference| where that is finite.

    Where one of them is nan or inf, a masked logit say, the other is the very same or infinitely far off.

    Example:
        >>> inf = float("inf")
        >>> difference_and_size(torch.tensor([1.5, -inf]), torch.tensor([1.0, -inf]))
        (0.5, 1.0)
    """
    same = (found == reference) | (found.isnan() & reference.isnan())
    apart = (found.double() - reference.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    size = torch.where(reference.isfinite(), reference.abs(), 0.0)
    return float(apart.masked_fill(same, 0.0).max()), float(size.max())


def _tensor_error(found: Tensor, reference: Tensor) -> float:
    difference, size = difference_and_size(found, reference)
    if difference == 0.0:
        return 0.0
    return difference / size if size and math.isfinite(difference) else math.inf


class _WidenedCasts(TorchFunctionMode):
    """Turn casts to a narrower floating dtype into casts to float64.

    Networks that keep a part of themselves in float32 (``x.float()``) could otherwise not run in float64, or would
    carry its rounding into the comparison.
    """

    _NARROW = (torch.float32, torch.float16, torch.bfloat16)
    _CASTS: tuple[Callable[..., Any], ...] = (Tensor.float, Tensor.half, Tensor.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = [self._widen(value) for value in args]
        named = {key: self._widen(value) for key, value in (kwargs or {}).items()}
        return (Tensor.double if func in self._CASTS else func)(*wide, **named)

    def _widen(self, value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in self._NARROW else value
