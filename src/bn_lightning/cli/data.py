"""The batches that a command's --data argument names."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.zoo import find_callable, read_checkpoint

__all__ = ["open_batches"]

_LIGHTNING = ("lightning.", "pytorch_lightning.")


def open_batches(
    data: str, options: Mapping[str, Any] | None, *, checkpoint: str | None, network: nn.Module
) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """Return training batches, and validation batches or ``None``.

    A data module is prepared and set up for fit, as a Trainer does it, and its batches go through
    ``on_before_batch_transfer`` and ``on_after_batch_transfer``, its own or else the network's; they stay on the CPU.

    Args:
        data: ``package.module:LightningDataModuleClass``, or a callable that returns a data module, batches, or a pair
            (training batches, validation batches); or one of these itself.
        options: Arguments of it.
        checkpoint: A Lightning checkpoint, whose hyperparameters of the data module are its arguments where ``options``
            does not say otherwise.
        network: The network they are for.

    Raises:
        BatchNormError: If there is no such thing, it fails, or it gives something else.
    """
    kind = find_callable(data)
    given = dict(options or {})
    if checkpoint is not None and isinstance(kind, type) and hasattr(kind, "train_dataloader"):
        saved = read_checkpoint(checkpoint).get("datamodule_hyper_parameters", {})
        given = {**dict(saved), **given}
    try:
        made = kind(**given) if callable(kind) else kind
        if not hasattr(made, "train_dataloader"):
            return _pair(made, data)
        made.prepare_data()
        made.setup("fit")
        train = _one_loader(made, "train", data)
        # Lightning's own raises, since every Trainer needs one; an audit does not.
        val = None if _is_lightnings(made, "val_dataloader") else _one_loader(made, "val", data)
    except BatchNormError:
        raise
    except Exception as error:
        raise BatchNormError(f"{data!r} gives no batches: it fails with {first_line(error)}") from error
    if train is None:
        raise BatchNormError(f"{data!r} gives no batches: its train_dataloader() returned None.")
    return _Transferred(train, made, network), None if val is None else _Transferred(val, made, network)


class _Transferred:
    """A loader whose batches have gone through the hooks that Lightning runs around the move to a device."""

    def __init__(self, loader: Iterable[Any], data: Any, network: nn.Module) -> None:
        self.loader = loader
        # What tells a shuffled loader.
        self.sampler, self.batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        self.hooks = [
            getattr(owner, name)
            for name in ("on_before_batch_transfer", "on_after_batch_transfer")
            if (owner := next((each for each in (data, network) if not _is_lightnings(each, name)), None)) is not None
        ]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            for hook in self.hooks:
                batch = hook(batch, 0)
            yield batch


def _pair(made: Any, data: str) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """Tell training and validation batches from two batches: no tensor, tuple or dict is a collection of batches."""
    if not isinstance(made, Iterable):
        raise BatchNormError(
            f"{data!r} gave a {type(made).__name__}; expected a data module, batches, or a pair of training and "
            "validation batches."
        )
    if isinstance(made, tuple) and len(made) == 2:
        train, val = made
        if isinstance(train, Iterable) and not isinstance(train, Tensor | tuple | dict | str):
            return train, val
    return made, None


def _one_loader(made: Any, stage: str, data: str) -> Iterable[Any] | None:
    loader = getattr(made, f"{stage}_dataloader")()
    if isinstance(loader, list | tuple) and len(loader) == 1:
        return loader[0]
    if isinstance(loader, list | tuple) and not loader:
        return None
    # A CombinedLoader has its loaders as flattened; its batches are (batch, batch_idx, dataloader_idx).
    if isinstance(loader, list | tuple | dict) or hasattr(loader, "flattened"):
        raise BatchNormError(
            f"{data!r} has several {stage} dataloaders; give a function that returns the batches to audit with."
        )
    return loader


def _is_lightnings(owner: Any, name: str) -> bool:
    """Tell whether a hook does nothing: it is Lightning's own, or there is none."""
    method = getattr(type(owner), name, None)
    return method is None or method.__module__.startswith(_LIGHTNING)
