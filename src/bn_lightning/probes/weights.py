"""The layers whose weights a probe looks at, in the order in which the network calls them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.probes.objective import Objective
from bn_lightning.selection import select_modules

__all__ = ["call_order", "is_weight_layer", "place_in", "weight_layers"]


def weight_layers(objective: Objective, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> dict[str, str]:
    """Pick the modules with a weight of two or more axes that takes a gradient: convolutions and linear layers.

    Returns:
        The weight's name to the layer's. A weight that two layers share counts for the first.

    Raises:
        BatchNormError: If there is none, or a pattern matches none.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> from bn_lightning.probes.objective import objective_of
        >>> with objective_of(network, nn.functional.mse_loss, (), None) as objective:
        ...     weight_layers(objective)
        {'0.weight': '0'}
    """
    layers = select_modules(objective.network, include, exclude, where=is_weight_layer)
    named = {f"{name}.weight" if name else "weight": name for name in layers}
    found = {weight: name for weight, name in named.items() if weight in objective.parameters}
    if not found:
        raise BatchNormError(
            f"{type(objective.network).__name__} has no layer to measure: expected a convolution or linear layer whose "
            "weight takes a gradient."
        )
    return found


def is_weight_layer(module: nn.Module) -> bool:
    """Tell whether a module has a weight of two or more axes, as convolutions and linear layers have.

    Example:
        >>> is_weight_layer(nn.Linear(2, 2)), is_weight_layer(nn.BatchNorm1d(2))
        (True, False)
    """
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1


@contextmanager
def call_order(network: nn.Module) -> Iterator[dict[str, int]]:
    """Number the modules in the order in which they are first called."""
    order: dict[str, int] = {}

    def numbered(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            order.setdefault(name, len(order))

        return hook

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.callback(module.register_forward_pre_hook(numbered(name)).remove)
        yield order


def place_in(order: dict[str, int], module: str) -> int:
    """Find when a module was first called, or else the nearest one around it; those never called come last.

    Example:
        >>> place_in({"": 0, "attention": 1}, "attention.out_proj")
        1
    """
    while module and module not in order:
        module = module.rpartition(".")[0]
    return order.get(module, len(order))
