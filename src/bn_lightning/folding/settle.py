"""Fold what is planned as far as it verifies: in float64, then in the model's own dtype."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bn_lightning.errors import first_line
from bn_lightning.folding.numbers import reference_tensor
from bn_lightning.folding.report import FoldPlan, FoldReport, FoldRow
from bn_lightning.folding.steps import FoldStep
from bn_lightning.folding.surgery import Surgery
from bn_lightning.folding.verify import comparison_problem, float_outputs, relative_error
from bn_lightning.preservation import in_float64
from bn_lightning.tracing.calls import ExampleCall

__all__ = ["fold_and_verify"]

# Folding reorders float64 arithmetic: a right fold differs by 1e-15 to 1e-12, a wrong one by far more than this.
_EXACT_TOLERANCE = 1e-9
# In its own dtype a right fold stays within 2.4 times the unfolded network's own error (measured over timm).
_NATIVE_FACTOR = 10.0


def fold_and_verify(surgery: Surgery, plan: FoldPlan, calls: Sequence[ExampleCall]) -> FoldReport:
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
