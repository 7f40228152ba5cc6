"""Build a network from its name."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError, first_line, nearest
from bn_lightning.zoo.hugging_face import build_transformers
from bn_lightning.zoo.package import built, zoo_package

__all__ = ["build_by_name", "find_callable", "is_zoo_name"]


def build_by_name(name: str, *, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
    """Build the network that is named, as `load_zoo_model` does, without its checkpoint and without looking at it.

    Raises:
        BatchNormError: If the name or its options do not fit.
    """
    zoo, _, within = name.partition(":")
    if not zoo or not within:
        raise BatchNormError(
            f"{name!r} does not say where the network comes from: expected 'timm:NAME', 'torchvision:NAME', 'hf:NAME' "
            "or 'package.module:callable', such as 'timm:resnet50'."
        )
    return _ZOOS.get(zoo, _from_callable)(name, pretrained, {} if num_classes is None else {"num_classes": num_classes})


def is_zoo_name(name: str) -> bool:
    """Tell whether a name is of a zoo, and not of a callable.

    Example:
        >>> is_zoo_name("timm:resnet50"), is_zoo_name("my.networks:Net")
        (True, False)
    """
    return name.partition(":")[0] in _ZOOS


def find_callable(name: str) -> Any:
    """Import what ``package.module:callable`` names.

    Raises:
        BatchNormError: If the module cannot be imported or has no such name.

    Example:
        >>> find_callable("torch.nn:Identity")
        <class 'torch.nn.modules.linear.Identity'>
    """
    path, _, attribute = name.partition(":")
    try:
        module = import_module(path)
    except Exception as error:
        raise BatchNormError(
            f"{name!r} needs the module {path!r}, which cannot be imported ({first_line(error)}); before the colon "
            f"stands 'timm', 'torchvision', 'hf' or the dotted name of a module on Python's path{nearest(path, _ZOOS)}."
        ) from error
    if not hasattr(module, attribute):
        known = [found for found in dir(module) if not found.startswith("_")]
        raise BatchNormError(f"module {path!r} has no {attribute!r}{nearest(attribute, known)}.")
    return getattr(module, attribute)


def _from_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    timm, within = zoo_package("timm", name), name.partition(":")[2]
    if ":" not in within and not timm.is_model(within):  # with a colon it is a place of its own, such as hf-hub:
        raise BatchNormError(
            f"timm {timm.__version__} has no {within!r}{nearest(within, timm.list_models())}; "
            "timm.list_models() names all."
        )
    return built(name, timm.create_model, within, pretrained=pretrained, **options)


def _from_torchvision(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    torchvision, within = zoo_package("torchvision", name), name.partition(":")[2]
    models = torchvision.models
    known = models.list_models()
    if within.lower() not in known:
        raise BatchNormError(
            f"torchvision {torchvision.__version__} has no {within!r}{nearest(within, known)}; "
            "torchvision.models.list_models() names all."
        )
    builder = models.get_model_builder(within)
    if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # the default downloads them
    return built(name, builder, weights="DEFAULT" if pretrained else None, **options)


def _from_callable(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise BatchNormError(
            f"pretrained=True is for timm, torchvision and hf; {name!r} loads what it loads, or the weights of "
            "checkpoint=."
        )
    target = find_callable(name)
    if isinstance(target, nn.Module) and not options:
        return target
    if isinstance(target, nn.Module) or not callable(target):
        raise BatchNormError(
            f"{name!r} is a {type(target).__name__}; expected a function or class that builds a network"
            + (f" with {', '.join(f'{key}={value}' for key, value in options.items())}." if options else ".")
        )
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "no arguments"
        raise BatchNormError(
            f"{name!r} cannot be called with {given} ({error}); name a function that takes them and builds the network."
        ) from error
    except ValueError:  # written in C, without a signature
        pass
    model = built(name, target, **options)
    if not isinstance(model, nn.Module):
        raise BatchNormError(f"{name!r} returned a {type(model).__name__}; expected a torch.nn.Module.")
    return model


_ZOOS: dict[str, Callable[[str, bool, dict[str, Any]], nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "hf": build_transformers,
}
