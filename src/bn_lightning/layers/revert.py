"""Give variants their plain class back, also later and without the report of the conversion."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import ConversionError
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.convert import Decision, change_layers
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.kinds import has_activation, is_converted_group_norm, is_plain, why_not
from bn_lightning.layers.report import ConversionReport
from bn_lightning.layers.swap import forget_variant

__all__ = ["revert_batch_norm"]


def revert_batch_norm(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    plain_class: type[_BatchNorm] | None = None,
    dry_run: bool = False,
) -> ConversionReport:
    """Turn variants back into the plain layers they were before `convert_batch_norm`, in place.

    Each converted layer remembers its plain class, through copies, pickles and further conversions; values stay as
    they are, and so does ``requires_grad``. A `DomainBatchNorm` goes on with domain 0. A GroupNorm is kept, since its
    running statistics are gone: only the conversion's own ``undo()`` leads back.

    Args:
        model: The network; it may be a layer itself.
        include: Name patterns (``fnmatch``) of the layers to revert; empty means all.
        exclude: Name patterns of the layers to leave out.
        plain_class: What variants become that were built as such, ``nn.BatchNorm2d`` for example; kept if ``None``.
        dry_run: Whether to report only, and give the model back as it was.

    Returns:
        One row for every BatchNorm layer, and ``undo()``.

    Raises:
        ConversionError: As for `convert_batch_norm`, and if ``plain_class`` is no plain BatchNorm.
        BatchNormError: If a pattern matches no BatchNorm layer.

    Example:
        >>> from bn_lightning import convert_batch_norm
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> _ = convert_batch_norm(model, "ghost")
        >>> _ = revert_batch_norm(model)
        >>> type(model[1]).__name__
        'BatchNorm1d'
    """
    if plain_class is not None and not (
        isinstance(plain_class, type)
        and issubclass(plain_class, _BatchNorm)
        and not issubclass(plain_class, BatchNormVariant)
    ):
        raise ConversionError(
            f"plain_class= takes a plain BatchNorm, torch.nn.BatchNorm2d for example; got {plain_class!r}."
        )

    def decide(layer: nn.Module) -> Decision:
        if is_plain(layer):
            return "already plain"
        if is_converted_group_norm(layer):
            return "kept: its running statistics are gone; only undo() of the conversion leads back"
        if not isinstance(layer, BatchNormVariant):
            return f"kept: {why_not(layer)}"
        target = layer.converted_from or plain_class
        if target is None:
            return f"kept: it was built as {type(layer).__name__}; say with plain_class= what it is to become"
        if has_activation(layer) and layer.converted_from is None:
            return f"kept: {target.__name__} would lose the drop and activation it was built with"
        return lambda: _revert(layer, target)

    return change_layers(model, decide, "to plain ones", include, exclude, dry_run=dry_run)


def _revert(layer: BatchNormVariant, plain: type[_BatchNorm]) -> str:
    notes = []
    if isinstance(layer, DomainBatchNorm):
        notes.append(f"domain 0 of {layer.num_domains}")
        layer.select(0, plain)
    else:
        forget_variant(layer)
        layer.__class__ = plain  # type: ignore[assignment]
    if issubclass(plain, nn.SyncBatchNorm):
        layer.__dict__.setdefault("process_group", None)
    else:
        layer.__dict__.pop("process_group", None)
    parameters = list(layer.parameters(recurse=False))
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        notes.append("scale and shift are not trainable")
    return "; ".join(notes)
