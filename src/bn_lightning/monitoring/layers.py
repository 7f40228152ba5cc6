"""Which layers are watched by default, and where their channels lie."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.loss import _Loss

from bn_lightning.selection import select_modules, unwrap

__all__ = ["channel_axis", "find_tensor", "unmeasurable", "watchable_layers"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CHANNELS_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def watchable_layers(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Pick the layers whose outputs are worth watching, in registration order.

    These are the modules without children, except Identity, dropout, losses, metrics and empty containers. A
    pattern without wildcards names that very module, with children or not.

    Args:
        model: The network, also inside DDP or ``torch.compile``.
        include: ``fnmatch`` patterns of which at least one has to match; empty means all.
        exclude: Patterns of which none may match.

    Returns:
        Name to module; the root is called ``"(root)"``. A module registered twice appears once.

    Raises:
        BatchNormError: If a pattern matches no such layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Dropout()))
        >>> list(watchable_layers(net)), list(watchable_layers(net, include=("1",)))
        (['0', '1.0'], ['1'])
    """
    model = unwrap(model)
    include, exclude = (patterns if isinstance(patterns, str) else tuple(patterns) for patterns in (include, exclude))
    modules = dict(model.named_modules())
    asked = {id(modules[name]) for name in include if name in modules}
    # A parametrization computes a weight, not an activation.
    hidden = {id(module) for name, module in modules.items() if "parametrizations" in name.split(".")}
    layers = select_modules(
        model,
        include,
        exclude,
        where=lambda module: id(module) in asked or (id(module) not in hidden and _is_layer(module)),
    )
    return {name or "(root)": module for name, module in layers.items()}


def channel_axis(module: nn.Module, output: Tensor) -> int:
    """Tell where a layer's output has its channels: last for linear, embedding and recurrent layers, else axis 1.

    Example:
        >>> channel_axis(nn.Linear(2, 3), torch.zeros(1, 5, 3)), channel_axis(nn.ReLU(), torch.zeros(1, 3, 5))
        (-1, 1)
    """
    if isinstance(module, nn.LayerNorm):
        # Subclasses that normalize (N, C, H, W) over C permute and back; then the sizes do not match at the end.
        return -1 if tuple(output.shape[-len(module.normalized_shape) :]) == module.normalized_shape else 1
    return -1 if isinstance(module, _CHANNELS_LAST) else 1


def find_tensor(output: object) -> Tensor | None:
    """Return the first floating tensor in nested tuples, lists, mappings and dataclasses, else the first tensor.

    Example:
        >>> find_tensor({"index": torch.tensor(1), "logits": [torch.tensor(2.0)]})
        tensor(2.)
    """
    if isinstance(output, Tensor):
        return output
    first = None
    for tensor in _tensors(output):
        if tensor.is_floating_point():
            return tensor
        first = tensor if first is None else first
    return first


def unmeasurable(tensor: Tensor) -> str:
    """Say why a tensor's values cannot be measured; empty if they can.

    Example:
        >>> unmeasurable(torch.zeros(1, dtype=torch.complex64))
        'its output is complex64'
    """
    if tensor.device.type == "meta":
        return "its output has no values (device meta)"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"its output is {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')}"
    if tensor.dtype not in _FLOATS | _INTEGERS:
        return f"its output is {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, (nn.Identity, _DropoutNd, _Loss, *_CONTAINERS)) or _is_metric(module):
        return False
    # MultiheadAttention calls its projection as a function; a parametrized layer has its parametrizations as children.
    inner = {name for name, _ in module.named_children()} - {"parametrizations"}
    return not inner or isinstance(module, nn.MultiheadAttention | _BatchNorm)


def _is_metric(module: nn.Module) -> bool:
    """Know a torchmetrics Metric by what it does: this room does not import Lightning's family."""
    return all(callable(getattr(module, name, None)) for name in ("update", "compute", "reset"))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
