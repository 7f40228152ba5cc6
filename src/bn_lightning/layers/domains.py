"""The domain a whole model is in, and leaving all but one behind."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers.convert import Decision, change_layers
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.report import ConversionReport
from bn_lightning.selection import unwrap

__all__ = ["select_domain", "use_domain"]


@contextmanager
def use_domain(model: nn.Module, domain: int) -> Iterator[None]:
    """Put every `DomainBatchNorm` of a model into a domain for as long as the context lasts.

    The layers may be anywhere, also in an ``nn.Sequential``, behind ``torch.compile`` and in DDP. Contexts nest. With
    activation checkpointing the backward pass belongs inside too, as it runs the layers again. Compiled code is
    compiled once for each domain.

    Args:
        model: The network, or a part of it.
        domain: From 0.

    Raises:
        BatchNormError: If the model has no such layer, or one of them no such domain.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), DomainBatchNorm(3))
        >>> with use_domain(net, 1):
        ...     _ = net(torch.randn(4, 2))
        >>> net[1].num_batches_tracked, net[1].other_num_batches_tracked
        (tensor(0), tensor([1]))
    """
    model = unwrap(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DomainBatchNorm)}
    if not layers:
        raise BatchNormError(
            f"{type(model).__name__} has no DomainBatchNorm to put into domain {domain!r}. "
            'Convert its layers first: convert_batch_norm(model, "domain").'
        )
    for name, layer in layers.items():
        try:
            layer.check_domain(domain)
        except BatchNormError as error:
            raise BatchNormError(f"{name or '(root)'!r}: {error}") from None
    before = [layer.domain for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.domain = domain
        yield
    finally:
        for layer, previous in zip(layers.values(), before, strict=True):
            layer.domain = previous


def select_domain(model: nn.Module, domain: int, plain_class: type[_BatchNorm] | None = None) -> ConversionReport:
    """Turn every `DomainBatchNorm` of a model into a plain layer with one domain's tensors, in place, all or none.

    The state_dict is a plain network's afterwards.

    Args:
        model: The network.
        domain: The one to keep, from 0.
        plain_class: What layers become that were built as DomainBatchNorm, ``nn.BatchNorm2d`` for example. Those that
            were converted become what they were.

    Returns:
        One row for every BatchNorm layer, and ``undo()``.

    Raises:
        ConversionError: If there is no such layer, one has no such domain, or it is not known what one is to become.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), DomainBatchNorm(3))
        >>> print(select_domain(model, 1, nn.BatchNorm1d))
        converted 1 of 1 BatchNorm layers to domain 1 alone
          layer   before            after         reason
         ───────────────────────────────────────────────────
          1       DomainBatchNorm   BatchNorm1d   converted
    """
    inner = unwrap(model)
    if not any(isinstance(module, DomainBatchNorm) for module in inner.modules()):
        raise ConversionError(f"{type(inner).__name__} has no DomainBatchNorm of which to select domain {domain!r}.")

    def decide(layer: nn.Module) -> Decision:
        if not isinstance(layer, DomainBatchNorm):
            return f"kept: {type(layer).__name__} has no domains"

        def change() -> str:
            layer.select(domain, plain_class)
            return ""

        return change

    return change_layers(model, decide, f"to domain {domain} alone", (), ())
