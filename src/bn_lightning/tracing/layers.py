"""Tell which torch function is a layer, and which of its arguments is the weight."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "TENSOR_ROLES",
    "dropout_probability",
    "function_name",
    "layer_arguments",
    "reads_metadata",
    "reads_padding",
    "reads_shape_of_second",
]

TENSOR_ROLES = ("weight", "bias", "running_mean", "running_var")

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DECONV = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LAYERS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    torch.conv1d: ("conv", _CONV),
    torch.conv2d: ("conv", _CONV),
    torch.conv3d: ("conv", _CONV),
    torch.conv_transpose1d: ("conv_transpose", _DECONV),
    torch.conv_transpose2d: ("conv_transpose", _DECONV),
    torch.conv_transpose3d: ("conv_transpose", _DECONV),
    F.linear: ("linear", ("input", "weight", "bias")),
    F.batch_norm: (
        "batch_norm",
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
    torch.batch_norm: (
        "batch_norm",
        ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    ),
}
_DROPOUTS = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
)
# Older torch calls them all "fn".
_NAMES = {
    id(getattr(F, name)): name for name in (f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))
}
# What tells nothing of a tensor's elements; properties arrive as their getter.
# fmt: off
_METADATA = frozenset(
    {
        "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "storage_offset", "dtype",
        "device", "layout", "names", "itemsize", "nbytes", "element_size", "requires_grad", "is_leaf", "grad",
        "grad_fn", "retains_grad", "output_nr", "get_device", "__len__", "__hash__", "type", "is_contiguous",
        "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_inference", "is_conj", "is_neg",
        "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xla", "is_xpu", "is_mkldnn", "is_quantized", "is_sparse",
        "is_sparse_csr", "is_nested", "is_pinned", "has_names", "_version",
    }
)
# fmt: on
# Their second argument gives nothing but its shape.
_SHAPE_OF_SECOND = frozenset({"reshape_as", "view_as", "expand_as"})


def function_name(function: Callable[..., Any]) -> str:
    """Name a torch function as a user would write it.

    Example:
        >>> [function_name(each) for each in (torch.conv2d, torch.Tensor.__add__, torch.Tensor.shape.__get__)]
        ['conv2d', 'add', 'shape']
    """
    name = _NAMES.get(id(function)) or str(getattr(function, "__name__", type(function).__name__))
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(function, "__self__", None), "__name__", name))
    return name.strip("_") if name.startswith("__") else name


def layer_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, dict[str, Any]] | None:
    """Name the arguments of a convolution, linear or batch norm call; ``None`` for any other function.

    Returns:
        The kind (``conv, conv_transpose, linear, batch_norm``) and the arguments that were given.
    """
    try:
        kind, names = _LAYERS[function]
    except (KeyError, TypeError):
        return None
    return kind, {**dict(zip(names, args, strict=False)), **kwargs}


def dropout_probability(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    """Return the probability a dropout function is called with, ``None`` for any other function.

    Example:
        >>> dropout_probability(F.dropout2d, (torch.zeros(1),), {"training": False})
        0.5
        >>> dropout_probability(F.relu, (torch.zeros(1),), {}) is None
        True
    """
    if str(getattr(function, "__name__", "")).rstrip("_") not in _DROPOUTS:
        return None
    return float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))


def reads_padding(kind: str, given: Mapping[str, Any]) -> bool:
    """Tell whether some output of a convolution takes in zeros from beyond its input, instead of a value there.

    A transposed convolution does at its edges and in the gaps of its stride, unless its size and stride are 1.

    Example:
        >>> weight = torch.zeros(2, 3, 3, 3)
        >>> [reads_padding("conv", {"weight": weight, "padding": padding}) for padding in (0, (0, 1), "same", "valid")]
        [False, True, True, False]
    """
    padding, weight = given.get("padding", 0), given.get("weight")
    if kind == "conv" and padding == "same":
        return weight is None or any(size > 1 for size in weight.shape[2:])
    padded = padding != "valid" and _any(padding, lambda size: size > 0)
    if kind != "conv_transpose":
        return padded
    larger = weight is None or any(size > 1 for size in weight.shape[2:])
    return (
        padded
        or larger
        or _any(given.get("stride", 1), lambda size: size > 1)
        or _any(given.get("output_padding", 0), lambda size: size > 0)
    )


def _any(sizes: Any, holds: Callable[[int], bool]) -> bool:
    return any(holds(int(size)) for size in (sizes if isinstance(sizes, tuple | list) else (sizes,)))


def reads_metadata(function: Callable[..., Any]) -> bool:
    """Tell whether a function that returns no tensor looks at nothing but shape, dtype and the like."""
    name = str(getattr(function, "__name__", ""))
    return (function_name(function) if name == "__get__" else name) in _METADATA


def reads_shape_of_second(function: Callable[..., Any]) -> bool:
    """Tell whether a function takes nothing but the shape from its second argument."""
    return getattr(function, "__name__", "") in _SHAPE_OF_SECOND
