"""Which layers are watched by default, and which outputs can be measured."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError
from bn_lightning.internals import DropoutBase, LossBase, in_transform
from bn_lightning.selection import as_patterns, plain_name, select_modules, unwrap

__all__ = ["largest_finite", "unmeasurable", "watchable_layers"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def watchable_layers(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Pick the layers whose outputs are worth watching, in registration order.

    These are the modules without children, except Identity, dropout, losses, metrics and empty containers. What
    ``torch.jit`` has compiled is one layer. A pattern without wildcards names that very module, with children or not.

    Args:
        model: The network, also inside DDP or ``torch.compile``.
        include: ``fnmatch`` patterns of which at least one has to match; empty means all.
        exclude: Patterns of which none may match.

    Returns:
        Name to module; the root is called ``"(root)"``. A module registered twice appears once.

    Raises:
        BatchNormError: If a pattern matches no such layer, or the patterns leave none.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Dropout()))
        >>> list(watchable_layers(net)), list(watchable_layers(net, include=("1",)))
        (['0', '1.0'], ['1'])
    """
    model = unwrap(model)
    include, exclude = as_patterns(include, "include"), as_patterns(exclude, "exclude")
    modules = {plain_name(name): module for name, module in model.named_modules()}
    asked = {id(modules[name]) for name in include if name in modules}
    # A parametrization computes a weight, not an activation.
    hidden = {id(module) for name, module in modules.items() if "parametrizations" in name.split(".")}
    scripted = [module for module in modules.values() if isinstance(module, torch.jit.ScriptModule)]
    hidden.update(id(inner) for outer in scripted for inner in outer.modules() if inner is not outer)
    layers = select_modules(
        model,
        include,
        exclude,
        where=lambda module: id(module) in asked or (id(module) not in hidden and _is_layer(module)),
    )
    if not layers and (include or exclude):
        raise BatchNormError(f"include= and exclude= leave no layer of {type(model).__name__} to watch.")
    return {plain_name(name) or "(root)": module for name, module in layers.items()}


def unmeasurable(tensor: Tensor) -> str:
    """Say why a tensor's values cannot be measured; empty if they can.

    Example:
        >>> unmeasurable(torch.zeros(1, dtype=torch.complex64))
        'its output is complex64'
    """
    if in_transform(tensor):
        return "it runs inside torch.func, whose values cannot be read from outside"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"its output is a {type(tensor).__name__}, which computes in its own way"
    if tensor.device.type == "meta":
        return "its output has no values (device meta)"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"its output is {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')}"
    if tensor.dtype not in _FLOATS | _INTEGERS:
        return f"its output is {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def largest_finite(dtype: torch.dtype) -> float:
    """Return the largest finite value of a floating dtype, and NaN for others, which do not overflow to infinity.

    Example:
        >>> largest_finite(torch.float16), largest_finite(torch.uint8)
        (65504.0, nan)
    """
    return torch.finfo(dtype).max if dtype.is_floating_point else math.nan


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, (nn.Identity, DropoutBase, LossBase, *_CONTAINERS)) or _is_metric(module):
        return False
    # MultiheadAttention calls its projection as a function; a parametrized layer has its parametrizations as children.
    inner = {name for name, _ in module.named_children()} - {"parametrizations"}
    return not inner or isinstance(module, nn.MultiheadAttention | _BatchNorm | torch.jit.ScriptModule)


def _is_metric(module: nn.Module) -> bool:
    """Know a torchmetrics Metric by what it does: this room does not import Lightning's family."""
    return all(callable(getattr(module, name, None)) for name in ("update", "compute", "reset"))
