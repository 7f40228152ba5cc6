"""Borrow a model and give it back bit for bit, also after an error or an interrupt."""

import copy
import operator
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bn_lightning.errors import BatchNormError

__all__ = [
    "eagerly",
    "in_float64",
    "on_device",
    "out_of_inference_mode",
    "preserved",
    "preserved_rng",
    "without_autocast",
    "written_back",
]


_CONTAINERS = (list, dict, set, OrderedDict, deque, defaultdict)
_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Lend the model out; afterwards put back buffers, modes, attributes, gradients and random state.

    Gradients are set aside, so that the borrower starts from none and the owner's are never added to. Buffers are
    written in place and only where they changed, since optimizers, DDP and compiled graphs hold references.
    Attributes (a counter, a metric's state, a cache of one image size) are what they were, the very objects. Lists,
    dicts, sets and deques, one inside the other too, hold what they held, submodules and parameters too; tensors and
    NumPy arrays have their values, and generators of random numbers, of torch, NumPy and Python, their state. What a
    forward pass changes inside of other objects, or in a tensor inside of a container, is its own matter. Parameters
    are not copied: whoever writes to them has to undo it.

    Raises:
        BatchNormError: If a lazy module has not seen its first batch, since the forward pass would change the model,
            or if a buffer is of a kind whose value cannot be kept (quantized or nested).

    Example:
        >>> bn = nn.BatchNorm1d(2)
        >>> with preserved(bn):
        ...     _ = bn(torch.randn(4, 2))
        >>> bn.running_mean
        tensor([0., 0.])
    """
    _refuse_what_cannot_be_kept(model)
    parameters = list(model.parameters())
    # One step a callback: an error or a second interrupt in one of them does not skip the others.
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(*{tensor.device for tensor in (*parameters, *model.buffers())}))
        for parameter in parameters:
            stack.callback(_hand_back, parameter, parameter.grad, parameter.requires_grad)
        seen: set[int] = set()
        for module in model.modules():
            kept = {name: _Snapshot(buffer) for name, buffer in module._buffers.items()}
            stack.callback(_rebind, module, {name: snapshot.buffer for name, snapshot in kept.items()})
            for snapshot in kept.values():
                stack.callback(snapshot.restore)
            stack.callback(setattr, module, "training", module.training)  # not .train(): it recurses
            stack.callback(_put_back, vars(module), dict(vars(module)))
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    if _is_kept(value):  # a metric's state, which it adds to in place
                        stack.callback(_Snapshot(value).restore)
                elif "_hooks" not in name:
                    for restore in _restores(value, seen):
                        stack.callback(restore)
        for parameter in parameters:
            parameter.grad = None
        yield


@contextmanager
def preserved_rng(*devices: torch.device) -> Iterator[None]:
    """Put back the random state of torch (CPU and the given devices), NumPy and Python.

    Example:
        >>> with preserved_rng():
        ...     first = torch.rand(1)
        >>> bool(torch.rand(1) == first)
        True
    """
    restores = [
        _remember(torch.get_rng_state, torch.set_rng_state),
        _remember(random.getstate, random.setstate),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        restores.append(_remember(numpy.random.get_state, numpy.random.set_state))
    restores.extend(_device_rng(device) for device in devices if device.type not in ("cpu", "meta"))
    try:
        yield
    finally:
        for restore in restores:
            restore()


@contextmanager
def written_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put back what the borrower writes into parameters, which `preserved` does not, in place.

    It takes copies of all of them: for code that may train a part by itself, as an averaged teacher is.

    Yields:
        What puts back, at once, parameters and the buffers of other than BN layers that in-place operations changed.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> before = layer.weight.item()
        >>> with written_back(layer), torch.no_grad():
        ...     _ = layer.weight.add_(1)
        >>> layer.weight.item() == before
        True
    """
    own = {
        id(each) for module in model.modules() if isinstance(module, _BatchNorm) for each in module._buffers.values()
    }
    parameters = [_Snapshot(parameter) for parameter in model.parameters()]
    buffers = [_Snapshot(buffer) for buffer in model.buffers() if id(buffer) not in own and _is_kept(buffer)]

    def put_back() -> None:
        for snapshot in (*parameters, *buffers):
            snapshot.restore_if_counted()

    with ExitStack() as stack:
        for snapshot in parameters:
            stack.callback(snapshot.restore)
        yield put_back


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Turn every floating parameter and buffer into float64, then hand back the very storage that was there.

    Whatever the borrower writes to them in between is lost, by design.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with in_float64(layer):
        ...     layer.weight.dtype
        torch.float64
        >>> layer.weight.dtype
        torch.float32
    """
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    with ExitStack() as stack:
        for tensor in tensors:
            stack.callback(setattr, tensor, "data", tensor.data)
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a model on another device, then hand back the very storage that was there.

    Tensors in plain attributes, such as a metric's state, go along. Gradients stay behind and are handed back too.
    Whatever the borrower writes to parameters and buffers in between is lost, by design; if every tensor is there
    already, this does nothing.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with on_device(layer, torch.device("cpu")):
        ...     layer.weight.device
        device(type='cpu')
    """
    parameters = list(model.parameters())
    moving = [tensor for tensor in (*parameters, *model.buffers()) if tensor.device != device]
    with ExitStack() as stack:
        for parameter in parameters:
            # A gradient cannot be attached to a parameter on another device.
            stack.callback(setattr, parameter, "grad", parameter.grad)
        for tensor in moving:
            stack.callback(setattr, tensor, "data", tensor.data)
        for parameter in parameters:
            parameter.grad = None
        for tensor in moving:
            tensor.data = tensor.data.to(device)
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if name in _REGISTRIES or "_hooks" in name:
                    continue
                moved = _moved(value, device)
                if moved is not value:
                    stack.callback(vars(module).__setitem__, name, value)
                    vars(module)[name] = moved
        yield


@contextmanager
def out_of_inference_mode() -> Iterator[None]:
    """Run without gradients but outside inference mode, whose tensors carry no version and take no training.

    Tensors made in inference mode have to be cloned inside before use.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Run a model in the dtypes it has, also where the caller is inside ``torch.autocast``.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(nn.Linear(2, 2)):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    with ExitStack() as stack:
        for kind in {"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled modules as they are written: code compiled before a hook was added never calls it."""
    # Importing dynamo costs seconds, and where it was not imported nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Snapshot:
    """A buffer and its value."""

    def __init__(self, buffer: Tensor | None) -> None:
        self.buffer = buffer
        self.value = None if buffer is None else buffer.detach().clone()
        self.version = _version(buffer)

    def restore_if_counted(self) -> None:
        """Restore after an in-place operation, without counting as one: a backward pass may still need the tensor."""
        if _version(self.buffer) != self.version and self.buffer is not None and self.value is not None:
            self.version = _version(self.buffer)
            if self.buffer.shape == self.value.shape:
                self.buffer.data.copy_(self.value)

    def restore(self) -> None:
        if self.buffer is None or self.value is None or _same_bits(self.buffer, self.value):
            return
        with torch.no_grad():
            if self.buffer.shape == self.value.shape and self.buffer.dtype == self.value.dtype:
                self.buffer.copy_(self.value)
            else:  # the borrower resized or cast it
                self.buffer.data = self.value


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare by bits, since BN's kernel bumps no version.

    An unchanged buffer is not written: that would break a backward pass that still needs its present version.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.device.type == "meta":
        return True
    if one.layout != torch.strided:
        return False  # sparse: written in any case
    # Cloned, since a single element counts as contiguous whatever its stride, and then has no view as bytes.
    bits = [tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1) for tensor in (one, other)]
    return torch.equal(bits[0].view(torch.uint8), bits[1].view(torch.uint8))


def _moved(value: Any, device: torch.device) -> Any:
    """Move a tensor, or those in a list, tuple or dict; return the very value if there is none to move."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if type(value) not in (list, tuple, dict):
        return value
    items = _items(value)[len(value) :] if isinstance(value, dict) else list(value)
    moved = [_moved(each, device) if isinstance(each, Tensor) else each for each in items]
    if all(map(operator.is_, moved, items)):
        return value
    return dict(zip(value, moved, strict=True)) if isinstance(value, dict) else type(value)(moved)


def _is_kept(tensor: Tensor) -> bool:
    return not (tensor.requires_grad or tensor.is_quantized or tensor.is_nested)


def _rebind(module: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    if isinstance(module._buffers, dict):  # a TorchScript module's is a view that cannot be rebound
        module._buffers.clear()
        module._buffers.update(buffers)


def _put_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for name in attributes.keys() - before.keys():
        del attributes[name]
    attributes.update(before)


def _restores(value: Any, seen: set[int]) -> Iterator[Callable[[], object]]:
    """Remember what is inside of an attribute, and of what it holds: yield what puts it back."""
    if value is None or isinstance(value, int | float | str) or id(value) in seen:
        return
    numpy = sys.modules.get("numpy")
    if type(value) in _CONTAINERS:
        seen.add(id(value))
        yield partial(_refill, value, copy.copy(value))
        for each in list(value.values()) if isinstance(value, dict) else list(value):
            yield from _restores(each, seen)
    elif isinstance(value, torch.Generator):
        yield _remember(value.get_state, value.set_state)
    elif isinstance(value, random.Random):
        yield _remember(value.getstate, value.setstate)
    elif numpy is not None and isinstance(value, numpy.random.Generator):
        yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif numpy is not None and isinstance(value, numpy.random.RandomState):
        yield _remember(value.get_state, value.set_state)
    elif numpy is not None and isinstance(value, numpy.ndarray) and value.flags.writeable:
        seen.add(id(value))
        yield partial(numpy.copyto, value, value.copy())


def _refill(container: Any, before: Any) -> None:
    if len(container) == len(before) and all(map(operator.is_, _items(container), _items(before))):
        return
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(before)


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _hand_back(parameter: nn.Parameter, gradient: Tensor | None, requires_grad: bool) -> None:
    parameter.grad = gradient
    if parameter.requires_grad != requires_grad:  # or it would not be set on a tensor made in inference mode
        parameter.requires_grad_(requires_grad)


def _remember(get: Callable[[], Any], put: Callable[[Any], object]) -> Callable[[], object]:
    state = get()
    return lambda: put(state)


def _device_rng(device: torch.device) -> Callable[[], object]:
    backend = getattr(torch, device.type, None)
    if not hasattr(backend, "get_rng_state"):
        return lambda: None  # a device without a generator of its own draws on the CPU's
    assert backend is not None
    if device.type == "mps":  # the one backend with a single device and no argument for it
        return _remember(backend.get_rng_state, backend.set_rng_state)
    state = backend.get_rng_state(device)
    return lambda: backend.set_rng_state(state, device)


def _refuse_what_cannot_be_kept(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise BatchNormError(
                f"{name!r} is uninitialized: its lazy module has not seen data. Run one forward pass first."
            )
    for name, buffer in model.named_buffers():
        if buffer.is_quantized or buffer.is_nested:
            kind = "quantized" if buffer.is_quantized else "nested"
            raise BatchNormError(
                f"the buffer {name!r} is {kind}: its value cannot be kept and put back, and the model would not come "
                "back as it was. Give the part of the model that does not hold it, or a float copy."
            )
