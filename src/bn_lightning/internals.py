"""Every private torch or Lightning name in use; `tests/test_internals.py` names the one that vanishes.

`torch.nn.modules.batchnorm._BatchNorm`, which every BatchNorm layer is, and the documented ``_buffers``, ``_modules``
and ``_version`` are used where they are needed.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as DropoutBase
from torch.nn.modules.loss import _Loss as LossBase
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary as WeakTensorDictionary

__all__ = [
    "DropoutBase",
    "LossBase",
    "TorchDispatchMode",
    "WeakTensorDictionary",
    "add_png",
    "assert_async",
    "averaged_networks",
    "before_batch_transfer",
    "compiled_original",
    "drop_hooks",
    "gradient_scale",
    "hooks_on",
    "in_backward",
    "in_reentrant_checkpoint",
    "in_transform",
    "is_compiled",
    "logging_step",
    "never_compiled",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def add_png(experiment: Any, tag: str, png: bytes, size: tuple[int, int], step: int) -> bool:
    """Write a picture that is a PNG already to a TensorBoard log (``_get_file_writer``), and tell whether that worked.

    ``add_image``, the way without private names, writes five times as much: its PNG has no palette.
    """
    file_writer: Any = getattr(experiment, "_get_file_writer", lambda: None)()
    if not hasattr(file_writer, "add_summary"):
        return False
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
    except ImportError:
        return False
    height, width = size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    return True


def assert_async(condition: Tensor, message: str) -> None:
    """Stop the device, not the host, where a condition fails: a ``RuntimeError`` on a CPU (``_assert_async``)."""
    if hasattr(torch, "_assert_async"):
        torch._assert_async(condition, message)
    elif not condition:  # the host waits
        raise RuntimeError(message)


def averaged_networks(trainer: Any) -> list[nn.Module]:
    """Return the networks that ``WeightAveraging`` saves in place of the one that trains (``_average_model``)."""
    held = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [average.module for average in held if isinstance(average, AveragedModel)]


def before_batch_transfer(module: Any, batch: Any) -> Any:
    """Do to a batch what the user's hook does before it is moved (``_on_before_batch_transfer``, which picks whose)."""
    own = getattr(module, "_on_before_batch_transfer", None)
    return module.on_before_batch_transfer(batch, dataloader_idx=0) if own is None else own(batch, dataloader_idx=0)


def compiled_original(model: nn.Module) -> nn.Module | None:
    """Return the module behind ``torch.compile(model)``, else ``None`` (``_orig_mod``)."""
    children = model.__dict__.get("_modules")
    inner = children.get("_orig_mod") if isinstance(children, dict) else None  # a TorchScript module's is no dict
    return inner if isinstance(inner, nn.Module) else None


def drop_hooks(module: nn.Module) -> None:
    """Take away every forward and backward hook a module carries, its children's not (``_forward_hooks`` and so on)."""
    for kind in _HOOK_TABLES:
        getattr(module, kind, {}).clear()


def gradient_scale(trainer: Any) -> Tensor | None:
    """Return what ``precision="16-mixed"`` has multiplied the loss by, on the device (``_scale``); else ``None``."""
    scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
    scale = getattr(scaler, "_scale", None)
    return scale.detach().clone() if isinstance(scale, Tensor) else None


def in_backward() -> bool:
    """Tell whether a backward pass runs, as where activation checkpointing recomputes (``_current_graph_task_id``)."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def in_reentrant_checkpoint() -> bool:
    """Tell whether this is the forward pass, without gradients, of ``checkpoint(…, use_reentrant=True)``.

    It will be computed again in the backward pass, unless none of the inputs needs a gradient
    (``CheckpointFunction.forward``, looked for among the callers).
    """
    function = getattr(sys.modules.get("torch.utils.checkpoint"), "CheckpointFunction", None)
    code = getattr(getattr(function, "forward", None), "__code__", None)
    frame = None if code is None else sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None and any(getattr(frame.f_locals.get("ctx"), "needs_input_grad", ()))


def in_transform(tensor: Tensor) -> bool:
    """Tell whether a tensor is inside ``torch.func``'s grad, jvp or vmap (``is_functorch_wrapped_tensor``)."""
    known = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return known is not None and bool(known(tensor))


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``torch.compile`` runs a module: wrapped, in place (``_compiled_call_impl``) or by Lightning."""
    marks = ("_compiled_call_impl", "_compiler_ctx")
    return compiled_original(module) is not None or any(getattr(module, mark, None) is not None for mark in marks)


def logging_step(trainer: Any) -> int:
    """Return the step Lightning writes its own training metrics at (``_batches_that_stepped``).

    With several optimizers it differs from ``trainer.global_step``, which is the fallback.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def never_compiled(function: _Function) -> _Function:
    """Keep ``torch.compile`` out of a function, importing nothing of it where it is not used (``_disable_dynamo``)."""
    disabled = (torch._disable_dynamo if hasattr(torch, "_disable_dynamo") else torch.compiler.disable)(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return cast(_Function, call)


def hooks_on(module: nn.Module) -> list[str]:
    """Name the kinds of forward and backward hooks a module carries (``_forward_hooks`` and its siblings)."""
    return [kind.strip("_").replace("_", " ") for kind in _HOOK_TABLES if getattr(module, kind, None)]


_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
