"""Fold a network in place, verify it, and give the way back."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import FoldError, first_line
from bn_lightning.folding.arithmetic import owned_tensor
from bn_lightning.folding.guard import FoldGuard
from bn_lightning.folding.plan import plan_fold, require_foldable
from bn_lightning.folding.report import FoldPair, FoldPlan, FoldReport, FoldRow
from bn_lightning.folding.surgery import Surgery
from bn_lightning.folding.verify import comparison_problem, float_outputs, relative_error
from bn_lightning.preservation import in_float64, out_of_inference_mode, preserved
from bn_lightning.selection import unwrap
from bn_lightning.tracing.calls import ExampleCall, example_calls

__all__ = ["FoldResult", "fold_batch_norm"]

# Folding reorders float64 arithmetic: a right fold differs by 1e-15 to 1e-12, a wrong one by far more than this.
_EXACT_TOLERANCE = 1e-9
# In its own dtype a right fold stays within 2.4 times the unfolded network's own error (measured over timm).
_NATIVE_FACTOR = 10.0


@dataclass(frozen=True, slots=True)
class FoldResult:
    """A folded network and the way back.

    Attributes:
        model: The network in its own classes, wrappers taken off.
        report: One row a BatchNorm layer and the errors measured.
    """

    model: nn.Module
    report: FoldReport
    _surgery: Surgery = field(repr=False)

    def undo(self) -> None:
        """Restore the network bit for bit: the same Parameters, modules and order. Again is harmless.

        Where the network was moved, cast or put in another mode meanwhile, the BatchNorm layers follow it.
        """
        self._surgery.undo()

    @contextmanager
    def unfolded(self) -> Iterator[nn.Module]:
        """Lend the network out unfolded, for a checkpoint say, and fold it again afterwards."""
        pairs = self._surgery.pairs
        self._surgery.undo()
        try:
            yield self.model
        finally:
            for pair in pairs:
                self._surgery.fold(pair)

    def guarded(self) -> FoldGuard:
        """Watch the folded pairs with hooks, until ``close()``, for uses that the example inputs did not show."""
        return FoldGuard(self._surgery)

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def fold_batch_norm(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    inplace: bool = True,
) -> FoldResult:
    """Fold evaluation-mode BatchNorm into the convolution or linear layer before it, and verify the outputs.

    With ``s = weight / sqrt(running_var + eps)`` and ``t = bias - running_mean * s`` the producer's weight becomes
    ``s * weight`` and its bias ``s * bias + t``, computed in float64 and cast once; the BatchNorm layer becomes
    ``torch.nn.Identity``. The folded network is compared with the unfolded one on the example inputs, in
    float64 (relative error at most 1e-9) and in its own dtype; a fold that differs is rolled back and says so in
    its row. An exception or interrupt leaves the model as it was.

    Only what the example calls reach was verified: a branch they do not take, or code that calls a folded layer on
    its own, gets the normalized output. The folded network is plain torch, without hooks, and runs and loads
    without this library; ``result.guarded()`` watches it for such uses.

    Args:
        model: The network, in evaluation mode. Wrappers (``torch.compile``, DDP) are looked through.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those
            (several calls). Real data proves more than zeros.
        include: Name patterns of the BatchNorm layers to fold; empty means all.
        exclude: Name patterns of layers to keep.
        inplace: Fold ``model`` itself; otherwise a deep copy, and ``model`` stays as it is.

    Returns:
        The folded ``model``, its ``report`` and ``undo()``.

    Raises:
        FoldError: If the model has no BatchNorm layer or is in training mode, or cannot take the inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> result = fold_batch_norm(net, torch.randn(2, 3, 6, 6))
        >>> net
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> result.report.error <= 1e-9
        True
        >>> result.undo()
        >>> type(net[1]).__name__
        'BatchNorm2d'

    Reference:
        Jacob et al., arXiv:1712.05877, §3.2, eq. 14.

    See Also:
        ``torch.nn.utils.fuse_conv_bn_eval``, ``torch.fx.experimental.optimization.fuse``.
    """
    network = unwrap(model)
    require_foldable(network)
    calls = example_calls(example_inputs, error=FoldError)
    if not inplace:
        network = _copied(network)
    surgery = Surgery(network)
    try:
        with preserved(network), out_of_inference_mode():
            plan = plan_fold(network, example_inputs, include, exclude)
            report = _fold_and_verify(surgery, plan, calls)
    except BaseException:
        surgery.undo()
        raise
    return FoldResult(network, report, surgery)


@dataclass(frozen=True, slots=True)
class _Check:
    """Measures how far the model's outputs are from the reference."""

    model: nn.Module
    calls: Sequence[ExampleCall]
    reference: Sequence[Tensor]
    dtype: torch.dtype | None
    tolerance: float
    where: str

    def measure(self) -> tuple[float, str]:
        """Return the relative error, and what is wrong with it (empty if nothing)."""
        try:
            error = relative_error(float_outputs(self.model, self.calls, self.dtype), self.reference)
        except Exception as exception:  # the model reaches into the layer that is gone
            return math.inf, f"with it folded, the model raises {first_line(exception)}"
        return error, "" if error <= self.tolerance else (
            f"with it folded, the outputs differ by {error:.1e} in {self.where} (allowed {self.tolerance:.1e})"
        )


def _fold_and_verify(surgery: Surgery, plan: FoldPlan, calls: Sequence[ExampleCall]) -> FoldReport:
    """Fold what is planned and verified, first in float64 for good measure, then to stay."""
    model, pairs, rejected = surgery.model, list(plan.pairs), dict[str, str]()
    if not pairs:
        return FoldReport(plan.rows, 0.0, "nothing folded", _EXACT_TOLERANCE)
    dtype = _coarsest(model, pairs)
    native, note = str(dtype).removeprefix("torch."), ""
    tolerance, verified_in = _EXACT_TOLERANCE, "float64"
    error = 0.0
    exact: list[Tensor] | None = None
    with ExitStack() as stack:
        try:
            stack.enter_context(in_float64(model))
            exact = float_outputs(model, calls, torch.float64)
        except Exception as exception:
            note = f"The model cannot run in float64 ({first_line(exception)}): verified in {native} only."
        if exact is not None:
            check = _Check(model, calls, exact, torch.float64, tolerance, "float64")
            try:
                error, rejected = _settle(surgery, pairs, check)
            finally:
                surgery.undo()  # inside: these folds are written to the float64 copies
    pairs = [pair for pair in pairs if pair.batch_norm not in rejected]
    before = float_outputs(model, calls)
    reference = before if exact is None else exact
    native_before = None if exact is None else relative_error(before, exact)
    rounding = max(torch.finfo(dtype).eps ** 0.5, _NATIVE_FACTOR * (native_before or 0.0))
    native_after, more = _settle(surgery, pairs, _Check(model, calls, reference, None, rounding, native))
    rejected |= more
    if exact is None:
        error, tolerance, verified_in = native_after, rounding, native
    if not surgery.pairs:
        return FoldReport(tuple(_row(row, rejected) for row in plan.rows), 0.0, "nothing folded", tolerance, note=note)
    return FoldReport(
        rows=tuple(_row(row, rejected) for row in plan.rows),
        error=error,
        verified_in=verified_in,
        tolerance=tolerance,
        native_dtype=native,
        native_error_before=native_before,
        native_error_after=None if exact is None else native_after,
        note=note,
    )


def _settle(surgery: Surgery, pairs: Sequence[FoldPair], check: _Check) -> tuple[float, dict[str, str]]:
    """Fold all pairs; if the outputs differ, add one at a time and leave out those that do it.

    Returns:
        The error with what is folded in the end, and for each layer left out what was wrong.
    """
    problem = comparison_problem(check.reference)
    if problem or not pairs:
        return 0.0, {pair.batch_norm: problem for pair in pairs if problem}
    for pair in pairs:
        surgery.fold(pair)
    error, wrong = check.measure()
    if not wrong:
        return error, {}
    surgery.undo()
    if check.measure()[1]:
        return 0.0, {pair.batch_norm: "the model's own output changes from run to run" for pair in pairs}
    rejected, error = dict[str, str](), 0.0
    for pair in pairs:
        surgery.fold(pair)
        trial, wrong = check.measure()
        if wrong:
            surgery.unfold(pair)
            rejected[pair.batch_norm] = wrong
        else:
            error = trial
    return error, rejected


def _row(row: FoldRow, rejected: dict[str, str]) -> FoldRow:
    if row.name not in rejected:
        return row
    return replace(row, action="kept", into=None, reason="unverified", detail=rejected[row.name])


def _coarsest(model: nn.Module, pairs: Sequence[FoldPair]) -> torch.dtype:
    weights = [owned_tensor(model, pair.weight) for pair in pairs]
    return max((weight.dtype for weight in weights if weight is not None), key=lambda dtype: torch.finfo(dtype).eps)


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as exception:
        raise FoldError(
            f"{type(network).__name__} cannot be copied ({first_line(exception)}). "
            "Fold it in place (inplace=True) and take it back with result.undo()."
        ) from exception
