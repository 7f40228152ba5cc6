"""The packages that networks come from, imported when a name asks for them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from bn_lightning.errors import BatchNormError, first_line

__all__ = ["built", "zoo_package"]


def zoo_package(package: str, name: str) -> Any:
    """Import a package for the network of this name.

    Raises:
        BatchNormError: If it cannot be imported; the message says what to install.
    """
    try:
        return import_module(package)
    except Exception as error:
        raise BatchNormError(
            f"{name!r} needs the package {package}, which cannot be imported ({first_line(error)}): "
            "pip install 'bn-lightning[zoo]'"
        ) from error


def built(name: str, build: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call what builds the network of this name.

    Raises:
        BatchNormError: If it raises anything.
    """
    try:
        return build(*args, **options)
    except BatchNormError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise BatchNormError(
            f"{name!r} could not be built{f' with {given}' if given else ''} ({first_line(error)})."
        ) from error
