"""Example inputs as users give them, as one list of forward calls."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.preservation import eagerly
from bn_lightning.selection import failing_layer
from bn_lightning.tracing.nested import map_tensors

__all__ = ["ExampleCall", "example_calls"]


@dataclass(frozen=True, slots=True)
class ExampleCall:
    """The arguments of one forward pass.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def copied(self, dtype: torch.dtype | None = None) -> "ExampleCall":
        """Clone every tensor, so that a model that writes to its input leaves the caller's alone.

        Args:
            dtype: What floating-point tensors become; integers and masks keep theirs.
        """

        def copy(tensor: Tensor) -> Tensor:
            cloned = tensor.detach().clone()
            return cloned.to(dtype) if dtype is not None and cloned.is_floating_point() else cloned

        return ExampleCall(map_tensors(self.args, copy), map_tensors(dict(self.kwargs or {}), copy))

    def run(self, model: nn.Module, *, error: type[BatchNormError] = BatchNormError) -> Any:
        """Call the model, with what ``torch.compile`` compiled inside it run as written.

        Raises:
            BatchNormError: Of the given class, if forward raises; it says what was given and what forward takes.
        """
        try:
            with eagerly():
                return model(*self.args, **(self.kwargs or {}))
        except Exception as exception:
            layer = failing_layer(model, exception)
            where = f"{layer!r} ({type(model.get_submodule(layer)).__name__})" if layer else "it"
            raise error(
                f"{type(model).__name__}.forward{_signature(model)} could not run on example_inputs: given {self}, "
                f"{where} raised {first_line(exception).rstrip('.')}. Pass a tensor, a tuple of "
                "positional arguments, a dict of keyword arguments, or a list of those for several calls."
            ) from exception

    def __str__(self) -> str:
        parts = [_describe(value) for value in self.args]
        parts += [f"{name}={_describe(value)}" for name, value in (self.kwargs or {}).items()]
        return f"({', '.join(parts)})"


def example_calls(example_inputs: Any, *, error: type[BatchNormError] = BatchNormError) -> list[ExampleCall]:
    """Turn example inputs into the forward calls they stand for.

    Args:
        example_inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those
            (several calls).
        error: What to raise.

    Raises:
        BatchNormError: Of the given class, for anything else and for an empty list.

    Example:
        >>> [str(call) for call in example_calls([torch.ones(1, 2), (torch.ones(3), 4), {"x": torch.ones(5)}])]
        ['(float32[1, 2])', '(float32[3], 4)', '(x=float32[5])']
    """
    calls = [
        _one_call(item, error) for item in (example_inputs if isinstance(example_inputs, list) else [example_inputs])
    ]
    if not calls:
        raise error("example_inputs is an empty list: pass at least one call's inputs.")
    return calls


def _one_call(item: Any, error: type[BatchNormError]) -> ExampleCall:
    if isinstance(item, ExampleCall):
        return item
    if isinstance(item, Tensor):
        return ExampleCall((item,))
    if isinstance(item, tuple):
        return ExampleCall(item)
    if isinstance(item, Mapping):
        return ExampleCall((), dict(item))
    if isinstance(item, DataLoader):
        raise error("example_inputs is a DataLoader: take the inputs of one batch, such as next(iter(loader))[0].")
    raise error(
        "example_inputs takes a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of "
        f"those for several calls; got {_describe(item)}."
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_describe, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(inner)}" for key, inner in value.items()) + "}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    shape = getattr(value, "shape", None)
    return f"a {type(value).__module__}.{type(value).__name__}" + ("" if shape is None else f" of shape {shape}")


def _signature(model: nn.Module) -> str:
    try:
        return str(inspect.signature(model.forward))
    except (TypeError, ValueError):
        return "(…)"
