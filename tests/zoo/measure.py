"""Fold one network of the zoo and measure everything that the table tells."""

import gc
import hashlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from zoo.architectures import Architecture
from zoo.crashes import told
from zoo.fx_fuse import measure_fx
from zoo.outputs import outputs, relative_error, unfit
from zoo.rows import FoldingRow
from zoo.subjects import Subject, norm_calls, prepare
from zoo.targets import EXACT

from bn_lightning import fold_batch_norm
from bn_lightning.folding import FoldReport
from bn_lightning.folding.norms import named_norms

__all__ = ["measure_folding"]


def measure_folding(architecture: Architecture) -> FoldingRow:
    """Fold in float32 and undo, fold in float64 with ``standalone="affine"`` and undo, and let torch.fx fuse it."""
    row, start = FoldingRow(architecture.name), time.perf_counter()
    try:
        subject = prepare(architecture)
        number = norm_calls(subject.model, subject.examples).total()
        row = replace(row, size=subject.images.shape[-1], calls={"kept": number})
        try:
            row = _fold(row, subject)
            if row.unreached and "detection" in architecture.source:
                row = replace(row, problem=f"{row.unreached} layers were not reached")
        except Exception as exception:
            row = replace(row, crash=told(exception))
            subject = prepare(architecture)  # in whatever state the crash left it
        model, examples = subject.model.double(), subject.examples.double()
        row = replace(row, fx=measure_fx(row.name, number, model, examples, outputs(model, examples)))
    except Exception as exception:
        row = replace(row, crash=row.crash or told(exception))
    gc.collect()
    return replace(row, whole=time.perf_counter() - start)


def _fold(row: FoldingRow, subject: Subject) -> FoldingRow:
    model = subject.model
    row, folded = _fold_in_float32(replace(row, layers=len(named_norms(model))), subject)
    row = replace(row, native=_mean_error(folded, subject.exact) / _mean_error(subject.plain, subject.exact))
    model.double()
    reference = outputs(model, subject.examples.double())
    row = replace(row, problem=row.problem or unfit(reference))
    return _fold_in_float64(row, subject, reference)


def _fold_in_float32(row: FoldingRow, subject: Subject) -> tuple[FoldingRow, list[list[Tensor]]]:
    model = subject.model
    calls, before = norm_calls(model, subject.examples), _fingerprint(model)
    start = time.perf_counter()
    result = fold_batch_norm(model, subject.examples)
    seconds = time.perf_counter() - start
    outputs_folded = [outputs(result.model, image) for image in subject.singles]
    result.undo()
    report = result.report
    actions: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for each in report.rows:
        number = calls.pop(each.name, 0)
        actions[each.action] += number
        if each.reason:
            kept[each.reason] += number
    problem = "" if not calls else f"the report has no row for {dict(calls)}"
    if report.verified_in not in ("float64", "nothing folded"):
        problem = problem or f"verified in {report.verified_in} only: {report.note}"
    row = replace(
        row,
        unreached=sum(each.reason == "not_reached" for each in report.rows),
        calls=dict(+actions),
        kept=dict(+kept),
        reported=report.error,
        undone=_fingerprint(model) == before,
        seconds=seconds,
        problem=problem,
    )
    return row, outputs_folded


def _fold_in_float64(row: FoldingRow, subject: Subject, reference: list[Tensor]) -> FoldingRow:
    """Fold the network that is in float64 by now, and compare on the examples, on two others and on a larger image."""
    model, examples = subject.model, subject.examples.double()
    compared = [(examples, reference)]
    compared += [
        (image.double(), exact) for image, exact in list(zip(subject.singles, subject.exact, strict=True))[-2:]
    ]
    larger = nn.functional.pad(examples[:1], (0, 32, 0, 32), "circular")
    with suppress(Exception):  # it may take no other size
        exact = outputs(model, larger)
        # The statistics are not those of this image, and activations may explode: what rounding alone decides proves
        # nothing.
        if relative_error(outputs(model, larger * (1 + 1e-15)), exact) <= EXACT / 10:
            compared.append((larger, exact))
    calls, before = norm_calls(model, examples), _fingerprint(model)
    result = fold_batch_norm(model, examples, standalone="affine")
    left = len(named_norms(result.model))
    error = max(relative_error(outputs(result.model, images), expected) for images, expected in compared)
    result.undo()
    return replace(
        row,
        affine=_affine_calls(result.report, calls),
        left=left,
        error=error,
        undone=row.undone and _fingerprint(model) == before,
    )


def _affine_calls(report: FoldReport, calls: Counter[str]) -> int:
    return sum(calls[row.name] for row in report.rows if row.action == "affine")


def _mean_error(found: Sequence[Sequence[Tensor]], exact: Sequence[Sequence[Tensor]]) -> float:
    """Geometric mean over the images; an image without any error counts as one of 1e-12."""
    errors = [max(relative_error(one, other), 1e-12) for one, other in zip(found, exact, strict=True)]
    return statistics.geometric_mean(errors) if all(map(math.isfinite, errors)) else math.inf


def _fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Name, identity, dtype and a digest of the bits of every tensor of the state_dict, in its order."""
    return [
        (
            name,
            id(tensor),
            tensor.dtype,
            hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest(),
        )
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
