"""Fold a network in place, verify it, and give the way back."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import FoldError, first_line
from bn_lightning.folding.agreement import measure_agreement
from bn_lightning.folding.guard import FoldGuard
from bn_lightning.folding.numbers import reference_tensor
from bn_lightning.folding.plan import plan_fold, require_foldable
from bn_lightning.folding.report import FoldPlan, FoldReport, FoldRow
from bn_lightning.folding.steps import FoldStep
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
        steps = self._surgery.steps
        self._surgery.undo()
        try:
            yield self.model
        finally:
            self._surgery.fold(steps)

    def load_unfolded(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Load an unfolded checkpoint into the folded network: unfold, load, and fold the same layers again.

        `undo` afterwards leads to the network with what was loaded. The outputs are not verified again: the folds are
        the ones that were, with other numbers.

        Args:
            state_dict: With the keys of the network as it was before it was folded.
            strict: As in ``Module.load_state_dict``.

        Raises:
            FoldError: If the keys or shapes do not fit, or the new numbers do not allow a fold (statistics that are not
                finite, a negative scale under max pooling, …). The network is then folded, with what it held before.
        """
        steps, before = self._surgery.steps, None
        self._surgery.undo()
        try:
            before = copy.deepcopy(self.model.state_dict())
            self.model.load_state_dict(state_dict, strict=strict)
            self._surgery.fold(steps)
        except BaseException as exception:
            self._surgery.undo()
            if before is not None:
                self.model.load_state_dict(before)
            self._surgery.fold(steps)
            if isinstance(exception, RuntimeError) and not isinstance(exception, FoldError):
                raise FoldError(
                    f"the state_dict does not fit {type(self.model).__name__} as it was before it was folded: "
                    f"{exception}"
                ) from exception
            raise

    def guarded(self) -> FoldGuard:
        """Watch the folded layers with hooks, until ``close()``, for uses that the example inputs did not show."""
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
    standalone: str = "keep",
    batches: Iterable[Any] | None = None,
    max_batches: int = 32,
) -> FoldResult:
    """Fold evaluation-mode BatchNorm into the weights before or behind it, and verify the outputs.

    With ``s = weight / sqrt(running_var + eps)`` and ``t = bias - running_mean * s`` the weight of the layer before
    becomes ``s * weight`` and its bias ``s * bias + t``; a layer behind takes ``s`` into its input channels and
    ``weight @ t`` into its bias. All folds are computed in float64 and cast once. The BatchNorm layer becomes
    ``torch.nn.Identity``, or, where drop and activation belong to it (timm), a ``torch.nn.Sequential`` of those. The
    folded network is compared with the unfolded one on the example inputs, in float64 (relative error at most 1e-9) and
    in its own dtype; a fold that differs is rolled back and says so in its row. An exception or interrupt leaves the
    model as it was.

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
        standalone: What becomes of a layer that cannot be folded: ``"keep"``, or ``"affine"`` for a `ChannelAffine`,
            which makes the folded network depend on this library.
        batches: Your own data, tensors or tuples that begin with one, for `FoldReport.agreement`.
        max_batches: How many of them to take.

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
            plan = plan_fold(network, example_inputs, include, exclude, standalone=standalone)
            report = _fold_and_verify(surgery, plan, calls)
            result = FoldResult(network, report, surgery)
            if batches is not None:
                result = replace(result, report=_with_agreement(result, batches, max_batches))
            steps = surgery.steps
            surgery.undo()
        # Outside, where buffers stay as they are written: a frozen layer's weight may be one.
        surgery.fold(steps)
    except BaseException:
        surgery.undo()
        raise
    return result


def _with_agreement(result: FoldResult, batches: Iterable[Any], max_batches: int) -> FoldReport:
    def run(inputs: Any) -> tuple[Any, Any]:
        call = ExampleCall((inputs,))
        folded = call.copied().run(result.model, error=FoldError)
        with result.unfolded() as model:
            return call.copied().run(model, error=FoldError), folded

    return replace(result.report, agreement=measure_agreement(run, batches, max_batches=max_batches))


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
    model, steps = surgery.model, list(plan.steps)
    if not steps:
        return FoldReport(plan.rows, 0.0, "nothing folded", _EXACT_TOLERANCE)
    rejected: dict[str, str] = {}
    dtype = _coarsest(model, steps)
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
                error, rejected = _settle(surgery, steps, check)
            finally:
                surgery.undo()  # inside: these folds are written to the float64 copies
    steps = [step for step in steps if step.name not in rejected]
    before = float_outputs(model, calls)
    reference = before if exact is None else exact
    native_before = None if exact is None else relative_error(before, exact)
    rounding = max(torch.finfo(dtype).eps ** 0.5, _NATIVE_FACTOR * (native_before or 0.0))
    native_after, more = _settle(surgery, steps, _Check(model, calls, reference, None, rounding, native))
    rejected |= more
    if exact is None:
        error, tolerance, verified_in = native_after, rounding, native
    rows = tuple(_row(row, rejected) for row in plan.rows)
    if not surgery.is_folded:
        return FoldReport(rows, 0.0, "nothing folded", tolerance, note=note)
    return FoldReport(
        rows=rows,
        error=error,
        verified_in=verified_in,
        tolerance=tolerance,
        native_dtype=native,
        native_error_before=native_before,
        native_error_after=None if exact is None else native_after,
        note=note,
    )


def _settle(surgery: Surgery, steps: Sequence[FoldStep], check: _Check) -> tuple[float, dict[str, str]]:
    """Fold all steps; if the outputs differ, find those that do it and leave them out.

    Returns:
        The error with what is folded in the end, and for each layer left out what was wrong.
    """
    problem = comparison_problem(check.reference)
    if problem or not steps:
        return 0.0, {step.name: problem for step in steps if problem}

    def measured(trial: Sequence[FoldStep]) -> tuple[float, str]:
        surgery.undo()
        surgery.fold(trial)
        return check.measure()

    error, wrong = measured(steps)
    if not wrong:
        return error, {}
    if measured([])[1]:
        return 0.0, {step.name: "the model's own output changes from run to run" for step in steps}
    accepted: list[FoldStep] = []
    rejected: dict[str, str] = {}
    waiting = [list(steps)]
    while waiting:
        more = [step for step in waiting.pop(0) if not rejected.keys() & set(step.behind)]
        if not more:
            continue
        error, wrong = measured([*accepted, *more])
        if not wrong:
            accepted += more
        elif len(more) == 1:
            rejected[more[0].name] = wrong
        else:
            waiting[:0] = [more[: len(more) // 2], more[len(more) // 2 :]]
    for step in steps:
        if step not in accepted and step.name not in rejected:
            rejected[step.name] = f"it stands behind {step.behind[0]!r}, which could not be folded"
    return measured(accepted)[0] if accepted else measured([])[0], rejected


def _row(row: FoldRow, rejected: dict[str, str]) -> FoldRow:
    if row.name not in rejected:
        return row
    return FoldRow(row.name, "kept", None, "unverified", rejected[row.name])


def _coarsest(model: nn.Module, steps: Sequence[FoldStep]) -> torch.dtype:
    weights = [reference_tensor(model, target) for step in steps for target in step.targets]
    weights = weights or [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return max((weight.dtype for weight in weights), key=lambda dtype: torch.finfo(dtype).eps)


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as exception:
        raise FoldError(
            f"{type(network).__name__} cannot be copied ({first_line(exception)}). "
            "Fold it in place (inplace=True) and take it back with result.undo()."
        ) from exception
