"""The audit itself: measure, compare, judge."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bn_lightning.auditing.finding import SEVERITIES
from bn_lightning.auditing.reading import AuditReading, read_layer
from bn_lightning.auditing.report import AuditReport, gap_row
from bn_lightning.auditing.rules import RULES
from bn_lightning.errors import AuditError, RecalibrationError
from bn_lightning.recalibration import population_statistics
from bn_lightning.selection import describe, require_batch_norms, unwrap

__all__ = ["audit_batch_norm"]


def audit_batch_norm(
    model: nn.Module,
    train_batches: Iterable[Any],
    *,
    max_batches: int = 32,
    forward: Callable[[nn.Module, Any], object] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> AuditReport:
    """Tell which BN layers evaluate differently from what their training data say, and what to do about it.

    Every selected layer's running statistics are compared with the statistics of its input over the training batches,
    under the present weights (`bn_lightning.recalibration.population_statistics`); `functional.channel_gap` is the
    formula. Then every rule looks. The model, its gradients and the random state are given back bit for bit.

    Args:
        model: The network, in any mode; DDP and ``torch.compile`` wrappers are looked through.
        train_batches: Tensors, or tuples or lists whose first element is the input; anything else with ``forward``.
        max_batches: Take at most so many batches; a generator may be given.
        forward: A function ``(model, batch) -> output`` for other batches.
        include: Name patterns (``fnmatch``) of the BN layers to audit; empty means all.
        exclude: Name patterns of the BN layers to leave out.

    Returns:
        The report: ``print`` it, or ``.to_json()``, ``.exit_code()``.

    Raises:
        AuditError: If the model has no BN layer, none that is not frozen or none with running statistics, if there is
            no data, if a batch gives one value per channel, or if a batch is of unknown structure.
        BatchNormError: If a pattern matches no BN layer.

    Example:
        >>> import torch
        >>> bn = nn.BatchNorm1d(1)
        >>> report = audit_batch_norm(bn, [torch.tensor([[1.0], [3.0]])])
        >>> [(finding.rule, finding.severity) for finding in report.findings]
        [('fresh-statistics', 'error')]

    Reference:
        Wu & Johnson, arXiv:2105.07576.
    """
    network = unwrap(model)
    layers = require_batch_norms(network, include, exclude, error=AuditError)
    if all(layer.running_mean is None or layer.running_var is None for layer in layers.values()):
        raise AuditError(
            f"no selected BatchNorm layer of {type(network).__name__} has running statistics to compare with "
            f"({describe(layers)}): each normalizes by the batch in evaluation too. Build them with "
            "track_running_stats=True."
        )
    try:
        measured = population_statistics(
            network, train_batches, max_batches=max_batches, forward=forward, include=include, exclude=exclude
        )
    except RecalibrationError as error:
        raise AuditError(str(error)) from error
    reading = AuditReading(
        network, tuple(read_layer(name, layers[name], population) for name, population in measured.items())
    )
    if all(layer.gap is None and layer.population.unlike for layer in reading.layers):
        first = reading.layers[0]
        raise AuditError(
            f"no selected BatchNorm layer of {type(network).__name__} can be compared with the training data "
            f"({describe(layers)}). Of {first.name or '(root)'!r} ({type(first.layer).__name__}): "
            f"{first.population.unlike}."
        )
    rows = sorted((gap_row(layer) for layer in reading.layers), key=lambda row: row.rank)
    place = {row.name: index for index, row in enumerate(rows)}
    findings = sorted(
        (finding for rule in RULES for finding in rule.find(rule, reading)),
        key=lambda finding: (-SEVERITIES.index(finding.severity), place.get(finding.layer or "", -1)),
    )
    batches = next(iter(measured.values())).batches
    return AuditReport(type(network).__name__, batches, tuple(rows), tuple(findings))
