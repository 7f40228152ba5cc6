"""The network that a command's MODEL argument names, and inputs for it."""

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.preservation import preserved
from bn_lightning.zoo import (
    WeightsWarning,
    default_input_size,
    find_callable,
    is_zoo_name,
    load_zoo_model,
    read_checkpoint,
)

__all__ = ["importable_here", "inputs_for", "name_patterns", "open_network"]


@contextmanager
def importable_here(*names: str | None) -> Iterator[None]:
    """Let ``module:callable`` name a module in the working folder, as ``python -m`` does; a zoo's name does not."""
    path = list(sys.path)
    if any(name is not None and not is_zoo_name(name) for name in names):
        sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path[:] = path


def open_network(
    model: str, *, checkpoint: str | None = None, pretrained: bool = False, num_classes: int | None = None
) -> nn.Module:
    """Build the network, in evaluation mode, with its weights; say so on standard error if they are random.

    Args:
        model: As for `load_zoo_model`; or ``module:LightningModuleClass``, whose ``load_from_checkpoint`` then takes
            the checkpoint.
        checkpoint: A file of weights, or a Lightning checkpoint.
        pretrained: The zoo's own weights.
        num_classes: Of the classifier.

    Raises:
        BatchNormError: If anything of it does not fit.
    """
    if checkpoint is not None and not is_zoo_name(model) and ":" in model:
        kind = find_callable(model)
        # Of both Lightning families, and without importing either.
        if isinstance(kind, type) and hasattr(kind, "load_from_checkpoint"):
            if pretrained or num_classes is not None:
                raise BatchNormError(
                    f"{model!r} gets its weights and its number of classes from the Lightning checkpoint; leave out "
                    "--pretrained and --num_classes."
                )
            return _from_lightning(kind, checkpoint).eval()
    with _odd_weights_told():
        network = load_zoo_model(model, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes).eval()
    if is_zoo_name(model) and checkpoint is None and not pretrained:
        print(
            "bn-lightning: the weights are random; --checkpoint or --pretrained brings trained ones.", file=sys.stderr
        )
    return network


def name_patterns(given: list[str] | str) -> tuple[str, ...]:
    """Take ``--include`` and ``--exclude`` apart: patterns with commas between, or a list from a file of settings.

    Example:
        >>> name_patterns("layer1.*, *.bn2")
        ('layer1.*', '*.bn2')
    """
    parts = given.split(",") if isinstance(given, str) else given
    return tuple(part.strip() for part in parts if part.strip())


def inputs_for(network: nn.Module, input_size: str | None = None) -> Any:
    """Make example inputs: standard normal with a fixed seed, two of the network's own size, or of the given one.

    Args:
        network: A LightningModule's ``example_input_array`` is taken as it is.
        input_size: Numbers with commas between: one to three are the size of one example, of four or five the first
            is the batch.

    Raises:
        BatchNormError: If the size cannot be read, the network does not say one, or cannot take it.
    """
    if input_size is None and getattr(network, "example_input_array", None) is not None:
        return network.example_input_array
    size = default_input_size(network) if input_size is None else _parsed(input_size)
    if size is None:
        raise BatchNormError(
            f"{type(network).__name__} does not say the size of its inputs; give it, such as --input_size 3,224,224"
        )
    inputs = torch.randn(size if len(size) > 3 else (2, *size), generator=torch.Generator().manual_seed(0))
    floating = [parameter for parameter in network.parameters() if parameter.is_floating_point()]
    inputs = inputs.to(floating[0]) if floating else inputs
    try:
        with preserved(network), torch.no_grad():
            network(inputs)
    except Exception as error:
        raise BatchNormError(
            f"{type(network).__name__} cannot take inputs of {list(inputs.shape)} ({first_line(error).rstrip('.')}); "
            "--input_size gives another size."
        ) from error
    return inputs


@contextmanager
def _odd_weights_told() -> Iterator[None]:
    """Print what is odd about weights to standard error, without the place in the library that warnings point at."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", WeightsWarning)
        yield
    for each in told:
        if issubclass(each.category, WeightsWarning):
            print(f"bn-lightning: {each.message}", file=sys.stderr)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _parsed(input_size: str) -> tuple[int, ...]:
    numbers = [part.strip() for part in input_size.strip("()[] ").split(",")]
    size = tuple(int(number) for number in numbers if number.isdecimal())
    if len(size) != len(numbers) or len(size) > 5 or 0 in size:
        raise BatchNormError(
            f"--input_size takes one to five whole numbers above 0 with commas between, such as 3,224,224 for one "
            f"example or 8,3,224,224 for a batch of 8; got {input_size!r}."
        )
    return size


def _from_lightning(kind: Any, checkpoint: str) -> nn.Module:
    # Lightning before 2.6 has no weights_only here; a file that does not need it is read the same without.
    content = read_checkpoint(checkpoint)
    if "state_dict" not in content:
        raise BatchNormError(
            f"{checkpoint!r} has no 'state_dict', so it is no Lightning checkpoint, which {kind.__name__} is loaded "
            "from; to load weights alone, name a function that builds the network."
        )
    known = inspect.signature(kind.load_from_checkpoint).parameters
    safely = {"weights_only": True} if "weights_only" in known else {}
    try:
        return kind.load_from_checkpoint(checkpoint, map_location="cpu", **safely)
    except BatchNormError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = f"{reason[:300]}…" if len(reason) > 300 else reason or first_line(error)
        raise BatchNormError(
            f"{kind.__name__}.load_from_checkpoint({checkpoint!r}) failed with {type(error).__name__}: {reason}"
        ) from error
