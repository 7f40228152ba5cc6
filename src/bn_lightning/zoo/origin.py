"""The network that a file says its weights are from, and how that one's BatchNorm layers are set."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.selection import named_batch_norms, unwrap
from bn_lightning.zoo.blank import build_blank

__all__ = ["BatchNormSettings", "Origin", "find_origin"]

_ZOO_OF_PACKAGE = {"timm": "timm", "torchvision": "torchvision", "transformers": "hf"}


@dataclass(frozen=True, slots=True)
class BatchNormSettings:
    """What no state_dict holds of a BatchNorm layer; ``momentum`` weighs the new batch, ``None`` is the mean of all."""

    eps: float
    momentum: float | None


@dataclass(frozen=True, slots=True)
class Origin:
    """The network that a file says its weights are from.

    Attributes:
        name: For `load_zoo_model`.
        said_by: What says so.
        settings: Of each of its BatchNorm layers, by name.
    """

    name: str
    said_by: str
    settings: Mapping[str, BatchNormSettings]


def find_origin(model: nn.Module, content: Mapping[str, Any], path: Path) -> Origin | None:
    """Look for the name of the weights' network, and build that without data to see its settings.

    Asked are the ``hyper_parameters`` of this library's modules, ``arch`` and ``args`` of timm's, torchvision's and
    PyTorch's own training scripts, and a ``config.json`` beside the file, as transformers and timm write.

    Args:
        model: The network that the weights are loaded into; only names of the same zoo are looked up.
        content: Of the file.
        path: Of the file.

    Returns:
        ``None`` if the file does not say, or names what this version of the zoo does not have.
    """
    zoo = _ZOO_OF_PACKAGE.get(type(unwrap(model)).__module__.partition(".")[0])
    if zoo is None:
        return None
    for said_by, name in _names(zoo, content, path):
        try:
            blank = build_blank(name)
        except BatchNormError:
            continue
        settings = {
            layer: BatchNormSettings(norm.eps, norm.momentum) for layer, norm in named_batch_norms(blank).items()
        }
        return Origin(name, said_by, _overridden(settings, content))
    return None


def _names(zoo: str, content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str]]:
    """Yield who says it, and the name, where somebody does."""
    hyperparameters = content.get("hyper_parameters")
    if isinstance(hyperparameters, Mapping):
        name = hyperparameters.get("model")
        if isinstance(name, str) and name.startswith(f"{zoo}:"):
            yield "the file's hyper_parameters['model']", name
    arguments = _arguments(content)
    for said_by, name in (
        ("the file's 'arch'", content.get("arch")),
        ("the file's args.arch", arguments.get("arch")),
        ("the file's args.model", arguments.get("model")),
    ):
        if isinstance(name, str) and zoo != "hf":
            yield said_by, f"{zoo}:{name}"
    beside = path.parent / "config.json"
    try:
        configuration = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except (OSError, ValueError):
        return
    if zoo == "hf" and isinstance(configuration.get("model_type"), str):
        yield f"{str(beside)!r}", f"hf:{path.parent.resolve()}"
    elif zoo == "timm" and isinstance(configuration.get("architecture"), str):
        yield f"{str(beside)!r}", f"timm:{configuration['architecture']}"


def _arguments(content: Mapping[str, Any]) -> Mapping[str, Any]:
    given = content.get("args")
    if isinstance(given, Namespace):
        return vars(given)
    return given if isinstance(given, Mapping) else {}


def _overridden(settings: dict[str, BatchNormSettings], content: Mapping[str, Any]) -> dict[str, BatchNormSettings]:
    """Take in what timm's training script was told with --bn-eps and --bn-momentum."""
    arguments = _arguments(content)
    eps, momentum = arguments.get("bn_eps"), arguments.get("bn_momentum")
    return {
        layer: BatchNormSettings(own.eps if eps is None else eps, own.momentum if momentum is None else momentum)
        for layer, own in settings.items()
    }
