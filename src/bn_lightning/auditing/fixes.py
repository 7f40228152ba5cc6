"""Do what a report says may be done safely, and give the way back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.finding import Finding, Repair
from bn_lightning.auditing.report import AuditReport
from bn_lightning.auditing.weights import changed_weight
from bn_lightning.auditing.words import many
from bn_lightning.errors import AuditError
from bn_lightning.functional import channel_gap, layer_gap
from bn_lightning.recalibration.result import write_statistics
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled
from bn_lightning.selection import named_batch_norms, unwrap

__all__ = ["AppliedFix", "FixResult", "LeftFinding", "apply_fixes"]

Setting = float | bool | None


@dataclass(frozen=True, slots=True)
class AppliedFix:
    """One change that was made.

    Attributes:
        layer: Name of the layer.
        action: ``"recalibrate"``, ``"momentum"`` or ``"training"``.
        before: The gap in standard deviations of the layer's output, the momentum (weight of the new batch), or whether
            the layer was in training mode.
        after: The same afterwards.
    """

    layer: str
    action: str
    before: Setting
    after: Setting

    def to_dict(self) -> dict[str, object]:
        """Return the fields."""
        return {"layer": self.layer, "action": self.action, "before": self.before, "after": self.after}


@dataclass(frozen=True, slots=True)
class LeftFinding:
    """A finding about which nothing was done.

    Attributes:
        rule: Slug of its rule.
        layer: Name of the layer, or ``None`` for the model as a whole.
        reason: Why.
    """

    rule: str
    layer: str | None
    reason: str

    def to_dict(self) -> dict[str, object]:
        """Return the fields."""
        return {"rule": self.rule, "layer": self.layer, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class FixResult(Tabled):
    """What `apply_fixes` did, and the way back.

    Attributes:
        rows: One for each change, in the order in which they were made.
        left: Findings about which nothing was done.
    """

    rows: tuple[AppliedFix, ...]
    left: tuple[LeftFinding, ...]
    _before: tuple[Callable[[], object], ...] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Put back what was there before, bit for bit, whatever it became since."""
        for put_back in self._before:
            put_back()

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return {"applied": [row.to_dict() for row in self.rows], "left": [each.to_dict() for each in self.left]}

    def table(self) -> Table:
        """One row a layer."""
        layers = len({row.layer for row in self.rows})
        return Table(
            f"{many(len(self.rows), 'fix')} applied to {many(layers, 'layer')}" if self.rows else "no fix applied",
            ("layer", "action", "before", "after"),
            [
                (row.layer or "(root)", row.action, _shown(row.action, row.before), _shown(row.action, row.after))
                for row in self.rows
            ],
            tuple(_told(self.left)),
        )


@dataclass(frozen=True, slots=True)
class _Change:
    """One change that is known to be possible."""

    row: AppliedFix
    make: Callable[[], object]
    put_back: Callable[[], object]


def apply_fixes(model: nn.Module, report: AuditReport) -> FixResult:
    """Do about an audit's findings what is safe to do, in place: running statistics, momenta and modes, no parameter.

    ``recalibrate`` writes the population statistics that the audit measured, so no data is needed again; since they
    hold for the weights as they were then, a network whose weights have changed is refused. What takes a person's
    decision is in ``result.left`` with the reason. Either every change is made or none.

    Args:
        model: The network that was audited; DDP and ``torch.compile`` wrappers are looked through.
        report: What `audit_batch_norm` returned.

    Returns:
        The changes, what was left, and ``undo()``.

    Raises:
        AuditError: If the report is of another network, or statistics would be written for weights that are no more;
            nothing was changed then.

    Example:
        >>> from bn_lightning.auditing import audit_batch_norm
        >>> bn = nn.BatchNorm1d(1)
        >>> report = audit_batch_norm(bn, [torch.tensor([[1.0], [3.0]])])
        >>> result = apply_fixes(bn, report)
        >>> bn.running_mean, bn.running_var
        (tensor([2.]), tensor([2.]))
        >>> result.undo()
        >>> bn.running_mean, bn.running_var
        (tensor([0.]), tensor([1.]))
    """
    network = unwrap(model)
    layers = named_batch_norms(network)
    _require_audited(network, layers, report)
    changes: dict[tuple[str, str], _Change] = {}
    left = []
    for finding in report.findings:
        if finding.repair is None:
            left.append(LeftFinding(finding.rule, finding.layer, f"for you to decide: {finding.fix}"))
            continue
        for name in _concerned(finding, report):
            planned = _planned(name, layers[name], finding.repair, report)
            if isinstance(planned, _Change):
                changes.setdefault((name, finding.repair.action), planned)
            elif planned is not None:
                left.append(LeftFinding(finding.rule, name, planned))
    if any(change.row.action == "recalibrate" for change in changes.values()):
        _require_same_weights(network, report)
    with ExitStack() as stack:
        for change in changes.values():
            stack.callback(change.put_back)  # before it is made: an interrupt may leave it half done
            change.make()
        stack.pop_all()
    made = changes.values()
    return FixResult(tuple(each.row for each in made), tuple(left), tuple(each.put_back for each in made))


def _require_audited(network: nn.Module, layers: Mapping[str, _BatchNorm], report: AuditReport) -> None:
    named = {row.name for row in report.layers} | {each.layer for each in report.findings if each.layer is not None}
    unknown = sorted(named - layers.keys())
    if unknown:
        raise AuditError(
            f"this report is of another network: it is on {report.model} with a layer {unknown[0] or '(root)'!r}, and "
            f"{type(network).__name__} has no BatchNorm layer of that name. Nothing was changed; audit the network "
            "that is to be fixed."
        )
    for name, (mean, _) in report._population.items():
        if len(mean) != layers[name].num_features:
            raise AuditError(
                f"this report is of another network: {name or '(root)'!r} had {len(mean)} channels and has "
                f"{layers[name].num_features}. Nothing was changed; audit the network that is to be fixed."
            )


def _require_same_weights(network: nn.Module, report: AuditReport) -> None:
    changed = changed_weight(network, report._weights)
    if changed is not None:
        raise AuditError(
            f"the weights of {type(network).__name__} have changed since the audit ({changed!r} is not as it was), so "
            "that the statistics it measured are those of another network. Nothing was changed; audit again, or "
            "bn_lightning.recalibrate_batch_norm(model, train_batches)."
        )


def _concerned(finding: Finding, report: AuditReport) -> list[str]:
    if finding.layer is not None:
        return [finding.layer]
    return [row.name for row in report.layers]


def _planned(name: str, layer: _BatchNorm, repair: Repair, report: AuditReport) -> _Change | str | None:
    """Plan a change, or say why it cannot be made; ``None`` where it is as it should be."""
    if repair.action == "recalibrate":
        return _recalibration(name, layer, report)
    before, after = getattr(layer, repair.action), repair.value
    if before == after:
        return None
    return _Change(
        AppliedFix(name, repair.action, before, after),
        lambda: setattr(layer, repair.action, after),
        lambda: setattr(layer, repair.action, before),
    )


def _recalibration(name: str, layer: _BatchNorm, report: AuditReport) -> _Change | str:
    if name not in report._population:
        rows = {row.name: row.reason for row in report.layers}
        return f"no population statistics of it were measured ({rows.get(name) or 'it was not audited'})"
    mean, var = report._population[name]
    running_mean, running_var = layer.running_mean, layer.running_var
    if running_mean is None or running_var is None:
        return "it has no running statistics any more"
    new = mean.to(running_mean), var.to(running_var)
    if not all(bool(torch.isfinite(each).all()) for each in new):
        return f"its population statistics are not finite as {running_mean.dtype}"
    old = running_mean.detach().clone(), running_var.detach().clone()
    weight = None if layer.weight is None else layer.weight.detach()

    def gap(pair: tuple[Tensor, Tensor]) -> float:
        running = pair[0].to(mean), pair[1].to(mean)
        return float(layer_gap(channel_gap(*running, mean, var, layer.eps), weight))

    return _Change(
        AppliedFix(name, "recalibrate", gap(old), gap(new)),
        lambda: write_statistics(layer, *new),
        lambda: write_statistics(layer, *old),
    )


def _shown(action: str, value: Setting) -> str:
    if action == "training":
        return "training mode" if value else "evaluation mode"
    shown = "None" if value is None else f"{value:.3g}"
    return f"gap {shown} output std" if action == "recalibrate" else shown


def _told(left: tuple[LeftFinding, ...]) -> Iterator[str]:
    """Tell findings that share a rule and a reason once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for each in left:
        names = groups.setdefault((each.rule, each.reason), [])
        names += [] if each.layer is None else [each.layer or "(root)"]
    for (rule, reason), names in groups.items():
        where = f" in {names[0]}" if names else ""
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"left: {rule}{where}{more}: {reason}"
