"""Write weights back in the form of the file they came from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.reports.atomic import atomic_write
from bn_lightning.zoo.checkpoint import read_checkpoint

__all__ = ["save_checkpoint"]

_HOLDERS = ("state_dict", "model")


def save_checkpoint(model: nn.Module, path: str | Path, like: str | Path | None = None) -> None:
    """Write the weights of a network; the file is complete, or not there.

    Args:
        model: The network.
        path: The new file; missing folders are made. ``.safetensors`` is written by safetensors.
        like: A file that the network's weights were loaded from. The new one then is the same, its weights apart: a
            Lightning checkpoint stays one, with its optimizer states, epoch and hyperparameters, and a prefix of all
            keys (``module.``, ``model.``) stays.

    Raises:
        BatchNormError: If a file cannot be read or written, or ``like`` has none of the network's keys.

    Example:
        >>> import tempfile
        >>> network = nn.BatchNorm1d(2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "state_dict": network.state_dict(prefix="model.")}, f"{folder}/old.ckpt")
        ...     save_checkpoint(nn.BatchNorm1d(2), f"{folder}/new.ckpt", like=f"{folder}/old.ckpt")
        ...     new = torch.load(f"{folder}/new.ckpt")
        >>> new["epoch"], next(iter(new["state_dict"]))
        (3, 'model.weight')
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    content: Mapping[str, Any] = weights
    if like is not None:
        content = _replaced(read_checkpoint(like), weights, str(like))
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _write_safetensors(path, content)
        else:
            with atomic_write(path) as file:
                torch.save(content, file)
    except OSError as error:
        raise BatchNormError(f"the weights cannot be written to {str(path)!r} ({first_line(error)}).") from error


def _replaced(content: Mapping[str, Any], weights: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Put the weights in place of those that a file holds, under the file's own prefix."""
    holder = next((key for key in _HOLDERS if isinstance(content.get(key), Mapping)), None)
    held = content if holder is None else content[holder]
    prefix = _prefix(held, weights)
    if prefix is None:
        raise BatchNormError(f"{path!r} holds none of the network's weights, so that they cannot be written like it.")
    owned = {f"{prefix}{key}": value for key, value in weights.items()}
    # What the file holds beside this network (a loss's weights, a second network) stays.
    others = {key: value for key, value in held.items() if not _belongs(key, prefix, weights)}
    written = {**{key: owned[key] for key in held if key in owned}, **owned, **others}
    return written if holder is None else {**content, holder: written}


def _prefix(held: Mapping[str, Any], weights: Mapping[str, Any]) -> str | None:
    candidates = {
        key[: -len(own)] if own else key for own in weights for key in held if key == own or key.endswith(f".{own}")
    }
    found = {prefix: sum(f"{prefix}{own}" in held for own in weights) for prefix in candidates}
    return max(found, key=lambda prefix: (found[prefix], -len(prefix)), default=None)


def _belongs(key: str, prefix: str, weights: Mapping[str, Any]) -> bool:
    """Tell whether a key of the file is of a module of the network: conversion can drop tensors of such."""
    owners = {own.rpartition(".")[0] for own in weights}
    return key.startswith(prefix) and key[len(prefix) :].rpartition(".")[0] in owners


def _write_safetensors(path: Path, content: Mapping[str, Any]) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise BatchNormError("a .safetensors file needs the package safetensors: pip install safetensors") from error
    with atomic_write(path) as file:
        file.write(save({key: value.contiguous() for key, value in content.items()}))
