"""Load a file of weights into a network: all of it or nothing."""

import argparse
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parameter import is_lazy

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.selection import named_batch_norms
from bn_lightning.zoo.load_report import LoadReport, Remark
from bn_lightning.zoo.origin import find_origin
from bn_lightning.zoo.remarks import momentum_remarks, origin_remarks, statistics_remarks

__all__ = ["load_checkpoint", "read_checkpoint"]

_STATISTICS = ("running_mean", "running_var")

# What DataParallel and DDP, a LightningModule around a network, and torch.compile put before every key.
_PREFIXES = ("module.", "model.", "_orig_mod.")


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Load the weights in a file into a network, in place.

    The file holds a ``state_dict``, or a dict with one under ``"state_dict"`` or ``"model"``. A leading ``module.``,
    ``model.`` or ``_orig_mod.`` that all its keys have in common is taken off where that makes them fit. Of a Lightning
    checkpoint the network is found under whatever attribute the LightningModule holds it.

    A file without any running statistics is loaded, and the report says so; nothing else may be missing.

    Args:
        model: The network.
        path: The file, see `read_checkpoint`.

    Returns:
        What was loaded, and what is odd about it: BatchNorm statistics, ``eps`` and ``momentum``.

    Raises:
        BatchNormError: If the file cannot be read, or its keys or shapes do not fit; they are named, and the network
            is as it was.

    Example:
        >>> import tempfile
        >>> trained, network = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": trained.state_dict(prefix="module.")}, f"{folder}/weights.pt")
        ...     load_checkpoint(network, f"{folder}/weights.pt").prefix
        'module.'
        >>> torch.equal(network.weight, trained.weight)
        True
    """
    content = read_checkpoint(path)
    given = _state_dict(content, path)
    own = model.state_dict()
    # On a tie the first: the keys as they stand in the file.
    candidates = _without_prefixes(given, of_lightning="pytorch-lightning_version" in content)
    prefix, fitting = min(candidates, key=lambda candidate: len(candidate[1].keys() ^ own.keys()))
    beside = [key for key in given if not key.startswith(prefix)]
    tensors = len(fitting)
    absent = _absent_statistics(model, own, fitting)
    for layer in absent:
        for name in _STATISTICS:
            fitting[f"{layer}.{name}".lstrip(".")] = own[f"{layer}.{name}".lstrip(".")]
    before = copy.deepcopy(own)
    try:
        model.load_state_dict(fitting)
    except BaseException as error:
        model.load_state_dict(before)
        if not isinstance(error, Exception):
            raise
        differences = "; ".join(_differences(own, fitting)) or " ".join(str(error).split())
        raise BatchNormError(
            f"the weights in {str(path)!r} do not fit {type(model).__name__}, and none were loaded: {differences}. "
            "Load them into the network they were saved from (num_classes sets the size of its classifier)."
        ) from error
    return _report(model, Path(path), content, prefix, tensors, absent, beside)


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Read a file of weights and plain values; no code of the file's runs.

    Args:
        path: Written by ``torch.save``, or by safetensors if it ends in ``.safetensors``.

    Raises:
        BatchNormError: If there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise BatchNormError(f"there is no checkpoint file {str(path)!r}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch has to say about the format of a file that it then refuses
            content = _read(Path(path))
    except Exception as error:
        # torch's own text advises weights_only=False, which runs whatever code the file brings.
        refused = isinstance(error, UnpicklingError)
        why = "it is of another format, or holds Python objects" if refused else first_line(error)
        raise BatchNormError(
            f"{str(path)!r} cannot be read as tensors and plain values ({why}); expected what "
            "torch.save(model.state_dict(), path) writes."
        ) from error
    if not isinstance(content, Mapping):
        raise BatchNormError(
            f"{str(path)!r} holds a {type(content).__name__}; expected a state_dict, or a dict with one under "
            "'state_dict' or 'model'."
        )
    return content


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # The training scripts of timm and torchvision save their command line with the weights; it runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(content: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return content[key]
    if not any(isinstance(value, Tensor) for value in content.values()) or not all(isinstance(k, str) for k in content):
        raise BatchNormError(
            f"{str(path)!r} holds {_some(list(content)) or 'nothing'}; expected the keys of a state_dict, or one under "
            "'state_dict' or 'model'."
        )
    return content


def _without_prefixes(given: Mapping[str, Any], *, of_lightning: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the weights as they are, then with one common prefix after the other taken off; each with what was.

    Of a LightningModule any attribute may be the network, and others stand beside it.
    """
    keyed = _shallow_copy(given)
    yield "", keyed
    yield from _common_prefixes("", keyed)
    for attribute in dict.fromkeys(key.partition(".")[0] for key in given if of_lightning and "." in key):
        prefix = f"{attribute}."
        under = _shallow_copy(given)
        for key in given:
            if not key.startswith(prefix):
                del under[key]
        consume_prefix_in_state_dict_if_present(under, prefix)
        yield prefix, under
        yield from _common_prefixes(prefix, under)


def _common_prefixes(taken: str, keyed: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    while True:
        common = [prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in keyed)]
        if not keyed or not common:
            return
        taken, keyed = taken + common[0], _shallow_copy(keyed)
        consume_prefix_in_state_dict_if_present(keyed, common[0])
        yield taken, keyed


def _shallow_copy(given: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the keys, and the versions of the modules that wrote them, which some modules ask for."""
    copied = copy.copy(given)
    metadata = getattr(given, "_metadata", None)
    if metadata is not None:
        copied._metadata = copy.copy(metadata)  # type: ignore[attr-defined]
    assert isinstance(copied, dict)
    return copied


def _absent_statistics(model: nn.Module, own: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Name the BatchNorm layers, if it is their statistics that the file lacks, of all of them, and nothing else."""
    tracking = [name for name, norm in named_batch_norms(model).items() if norm.running_mean is not None]
    keys = {f"{layer}.{name}".lstrip(".") for layer in tracking for name in _STATISTICS}
    lacking = {key for key in own if key not in given and not key.endswith("num_batches_tracked")}
    return tracking if tracking and lacking == keys else []


def _report(
    model: nn.Module,
    path: Path,
    content: Mapping[str, Any],
    prefix: str,
    tensors: int,
    absent: list[str],
    beside: list[str],
) -> LoadReport:
    norms = named_batch_norms(model)
    origin = find_origin(model, content, path)
    remarks = [*statistics_remarks(model, absent), *momentum_remarks(model)]
    remarks += origin_remarks(model, origin) if origin else ()
    if beside:
        message = f"left out, as they are no part of what stands under {prefix!r} in the file: {_some(beside)}"
        remarks.append(Remark("keys", "info", message))
    return LoadReport(
        path=str(path),
        tensors=tensors,
        prefix=prefix,
        source=origin.name if origin else None,
        batch_norms=len(norms),
        eps=tuple(dict.fromkeys(norm.eps for norm in norms.values())),
        momentum=tuple(dict.fromkeys(norm.momentum for norm in norms.values())),
        remarks=tuple(sorted(remarks, key=lambda remark: remark.severity != "warning")),
    )


def _differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    # A file of before torch 0.4.1 has no num_batches_tracked, and loads.
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    if missing:
        yield f"the file lacks {_some(missing)}"
    unknown = [key for key in given if key not in own]
    if unknown:
        yield f"the network lacks {_some(unknown)}"
    shapes = {key: (_shape(given[key]), _shape(value)) for key, value in own.items() if key in given}
    resized = [(key, theirs, ours) for key, (theirs, ours) in shapes.items() if theirs != ours]
    for key, theirs, ours in resized[:3]:
        yield f"{key!r} is {theirs} in the file and {ours} in the network"
    if len(resized) > 3:
        yield f"{len(resized) - 3} more differ in shape"


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) and not is_lazy(value) else f"a {type(value).__name__}"


def _some(keys: list[Any]) -> str:
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
