"""The network that a module trains, from what names it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.networks import build_network
from bn_lightning.zoo import find_callable, load_checkpoint, load_zoo_model, warn_of

__all__ = ["NetworkSource", "open_source", "require_plain"]

#: A name, ``{"class_path": …, "init_args": {…}}``, or the network itself.
NetworkSource = str | dict[str, Any] | nn.Module


def open_source(
    source: NetworkSource,
    num_classes: int,
    *,
    network_options: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
) -> nn.Module:
    """Build the network that is named, or take the one that is given.

    Args:
        source: With a colon, a name for `load_zoo_model`; any other name, one for `build_network`. Of a dict,
            ``class_path`` is the dotted name of a subclass of ``torch.nn.Module`` and ``init_args`` its arguments, in
            which such dicts may stand again.
        num_classes: For a network given by name.
        network_options: For a name of `build_network`.
        pretrained: For a zoo's name.
        checkpoint: A file of weights, see `load_checkpoint`.

    Raises:
        BatchNormError: If anything of it does not fit.

    Example:
        >>> open_source({"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}, 3)
        Linear(in_features=2, out_features=3, bias=True)
    """
    of_zoo = isinstance(source, str) and ":" in source
    if network_options and (of_zoo or not isinstance(source, str)):
        raise BatchNormError(
            f"network_options= are for a network of bn_lightning.networks, given by name; got {_told(source)}. "
            "{'class_path': …, 'init_args': {…}} has its own."
        )
    if pretrained and not of_zoo:
        raise BatchNormError(f"pretrained=True is for a zoo's name, such as 'timm:resnet50'; got {_told(source)}.")
    if of_zoo:
        assert isinstance(source, str)
        return load_zoo_model(source, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes)
    if isinstance(source, str):
        network = build_network(source, **{"num_classes": num_classes, **(network_options or {})})
    else:
        network = source if isinstance(source, nn.Module) else _from_class_path(source)
    if checkpoint is not None:
        warn_of(_told(source), load_checkpoint(network, checkpoint).remarks)
    return network


def require_plain(name: str, value: Any) -> None:
    """Check that a hyperparameter is made of what a checkpoint and a YAML file can hold.

    Raises:
        BatchNormError: If not.

    Example:
        >>> require_plain("norm_options", {"virtual_batch_size": 32, "include": ["layer4.*"]})
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            require_plain(f"{name}[{key!r}]", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            require_plain(f"{name}[{index}]", inner)
    elif not isinstance(value, str | int | float | bool | None):
        raise BatchNormError(
            f"{name} is a {type(value).__name__}; expected names, numbers, and lists and dicts of them, which a "
            "checkpoint can hold."
        )


def _from_class_path(given: Mapping[str, Any]) -> nn.Module:
    path, arguments = given.get("class_path"), given.get("init_args", {})
    home, _, name = str(path).rpartition(".")
    if not home or not isinstance(arguments, Mapping) or given.keys() - {"class_path", "init_args"}:
        raise BatchNormError(
            f"a network given as a dict is {{'class_path': 'package.module.Class', 'init_args': {{…}}}}; got {given}."
        )
    kind = find_callable(f"{home}:{name}")
    # A checkpoint may hold this dict, and loading one must not call whatever it says.
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise BatchNormError(
            f"class_path {path!r} is no subclass of torch.nn.Module; a function that builds a network is named "
            f"{f'{home}:{name}'!r}."
        )
    inner = {key: _from_class_path(value) if _is_class_path(value) else value for key, value in arguments.items()}
    try:
        return kind(**inner)
    except BatchNormError:
        raise
    except Exception as error:
        raise BatchNormError(f"{path!r} cannot be built with init_args {arguments} ({first_line(error)}).") from error


def _is_class_path(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def _told(source: NetworkSource) -> str:
    if isinstance(source, nn.Module):
        return f"a {type(source).__name__}"
    return repr(source)
