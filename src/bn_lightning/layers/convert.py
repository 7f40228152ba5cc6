"""Put variants in the place of BatchNorm layers, and take them back."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.kinds import is_candidate, is_converted_group_norm, scripted_batch_norm, why_not
from bn_lightning.layers.report import EXCLUDED, ConversionReport, ConversionRow
from bn_lightning.layers.swap import LayerChange
from bn_lightning.layers.target import resolve_target
from bn_lightning.layers.wrappers import refuse_sharded, refuse_under_ddp
from bn_lightning.selection import require_batch_norms, select_modules, unwrap

__all__ = ["Decision", "change_layers", "convert_batch_norm"]

#: What is to become of a layer: a reason to leave it, or how to change it, which returns what there is to say.
Decision = str | Callable[[], str]
_CONVERSIONS = itertools.count()


def convert_batch_norm(
    model: nn.Module,
    variant: str | type[nn.Module],
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    dry_run: bool = False,
    **options: Any,
) -> ConversionReport:
    """Turn the BatchNorm layers of a model into a variant, in place.

    A layer takes another class and stays the object it is: parameters and buffers, state_dict keys, hooks, mode,
    ``momentum``, device, dtype and every reference to it are untouched. Layers of torch, SyncBatchNorm, Lightning's
    substitute for it, timm's ``BatchNormAct2d`` (whose drop and activation stay) and the variants themselves are
    converted; any other subclass is kept, and the report says so. Wrappers (``torch.compile``, DDP, DataParallel) are
    looked through, compiled code is compiled anew. If one layer cannot be configured, all are given back.

    ``Trainer(sync_batchnorm=True)`` turns every variant into a plain SyncBatchNorm, silently unless one of this
    library's callbacks is there to stop it: use ``"cross_replica"``.

    ``torch.fx`` (torchvision's feature extractors are built on it) and ``torch.jit.script`` take torch's own layers
    alone: convert afterwards, or revert before. ``torch.compile`` and ``torch.export`` take the variants.

    ``"group"`` leads to ``torch.nn.GroupNorm``: scale and shift stay, the running statistics leave the state_dict.

    Args:
        model: The network; it may be a BatchNorm layer itself.
        variant: ``frozen, ghost, renorm, debiased, cross_replica, masked, lp, noisy, adaptive, domain, group``, or a
            class.
        include: Name patterns (``fnmatch``) of the layers to convert; empty means all.
        exclude: Name patterns of the layers to leave out.
        dry_run: Whether to report only, and give the model back as it was.
        **options: The variant's settings, as its ``configure`` takes them.

    Returns:
        One row for every BatchNorm layer, and ``undo()``.

    Raises:
        ConversionError: If the variant or an option is unknown, the model has no BatchNorm layer, is sharded, or is
            inside DDP and would get other parameters, buffers or ``requires_grad``.
        BatchNormError: If a pattern matches no BatchNorm layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> print(convert_batch_norm(model, "ghost", virtual_batch_size=16))
        converted 1 of 1 BatchNorm layers to GhostBatchNorm
          layer   before        after            reason
         ──────────────────────────────────────────────────
          1       BatchNorm1d   GhostBatchNorm   converted
    """
    target = resolve_target(variant, options)

    def decide(layer: nn.Module) -> Decision:
        if target.is_reached(layer):
            return f"already {type(layer).__name__} with these options"
        reason = why_not(layer) or target.why_not(layer)
        return f"kept: {reason}" if reason else lambda: target.apply(layer)

    return change_layers(model, decide, f"to {target.name}", include, exclude, dry_run=dry_run)


def change_layers(
    model: nn.Module,
    decide: Callable[[nn.Module], Decision],
    goal: str,
    include: Iterable[str],
    exclude: Iterable[str],
    *,
    dry_run: bool = False,
) -> ConversionReport:
    """Change the layers that are picked and fit, all or none, and report on every one there is.

    Raises:
        ConversionError: See `convert_batch_norm`.
    """
    inner = unwrap(model)
    refuse_sharded(inner)
    candidates, picked = _pick(inner, include, exclude)
    names: dict[int, list[str]] = {}
    for name, module in inner.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    rows, changes = [], []
    try:
        for name, layer in candidates.items():
            before = type(layer).__name__
            decision = decide(layer) if name in picked else EXCLUDED
            if not isinstance(decision, str):
                changes.append(LayerChange(layer))
                decision = ": ".join(filter(None, ("converted", _attempt(name, decision))))
                if isinstance(layer, BatchNormVariant):
                    layer.known_as = name
                if isinstance(layer, BatchNormVariant) or is_converted_group_norm(layer):
                    layer.__dict__["conversion"] = next(_CONVERSIONS)
                changes[-1].note()
            also = names[id(layer)][1:]
            note = f" (also registered as {', '.join(also)})" if also else ""
            rows.append(ConversionRow(name, before, type(layer).__name__, decision + note))
        refuse_under_ddp(model, changes)
    except BaseException:
        _undo(changes)
        raise
    done = f"{'would convert' if dry_run else 'converted'} {len(changes)} of {len(rows)} BatchNorm layers {goal}"
    kept = sum(row.reason.startswith("kept") for row in rows)
    done += f", kept {kept} as they are" if kept else ""
    if dry_run:
        _undo(changes)
        changes = []
    return ConversionReport(done, tuple(rows), tuple(changes))


def _pick(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    candidates = select_modules(model, where=is_candidate)
    if not candidates:
        require_batch_norms(model, error=ConversionError)  # which refuses
    if all(scripted_batch_norm(layer) for layer in candidates.values()):
        raise ConversionError(
            f"TorchScript has compiled every BatchNorm layer of {type(model).__name__}. Convert before scripting."
        )
    picked = select_modules(model, include, exclude, where=is_candidate)
    if not picked:
        raise ConversionError(f"include= and exclude= leave no BatchNorm layer of {type(model).__name__} to work on.")
    return candidates, picked


def _attempt(name: str, change: Callable[[], str]) -> str:
    try:
        return change()
    except BatchNormError as error:
        raise ConversionError(
            f"{name or '(root)'!r} cannot be converted: {error} Nothing was converted; exclude= leaves a layer out."
        ) from error


def _undo(changes: list[LayerChange]) -> None:
    for change in reversed(changes):
        change.undo()
