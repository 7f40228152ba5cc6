"""Record a forward pass by executing it, never by names or symbolic tracing.

A ``TorchFunctionMode`` sees every call of a torch function with its arguments. Beneath it a
``TorchDispatchMode`` sees every kernel: one that reads a known tensor which the running function was not given
belongs to code the upper mode cannot see, such as a TorchScript child.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from bn_lightning.errors import BatchNormError
from bn_lightning.internals import TorchDispatchMode
from bn_lightning.preservation import out_of_inference_mode, preserved
from bn_lightning.selection import unwrap
from bn_lightning.tracing.calls import example_calls
from bn_lightning.tracing.layers import (
    TENSOR_ROLES,
    dropout_probability,
    function_name,
    layer_arguments,
    reads_metadata,
    reads_padding,
    reads_shape_of_second,
)
from bn_lightning.tracing.memory import Memories
from bn_lightning.tracing.nested import iter_tensors, map_tensors
from bn_lightning.tracing.passing import Passing, ValueRef, passing_kind
from bn_lightning.tracing.record import DropoutUse, ForwardRecord, LayerUse, ModuleCall, Operation, Value
from bn_lightning.tracing.unfinished import OpenCall, OpenValue

__all__ = ["Watch", "record_forward", "record_run"]

Watch = Callable[[int, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], None]
"""Told of each operation before it runs: its index, function, arguments and keyword arguments."""


def record_forward(
    model: nn.Module, example_inputs: Any, *, error: type[BatchNormError] = BatchNormError
) -> ForwardRecord:
    """Run the model on example inputs and record who made each value and who reads it.

    Layers are identified by the parameters and buffers they are called with. The model is given back bit for
    bit, the inputs are cloned, and it works inside ``torch.inference_mode()``.

    Args:
        model: The network, in the mode in which it should be recorded. Wrappers (``torch.compile``, DDP) are
            looked through.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those
            (several calls).
        error: What to raise.

    Returns:
        One record over all calls. ``print`` shows one row an operation.

    Raises:
        BatchNormError: Of the given class, if ``example_inputs`` are not of that form or forward cannot take them.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> record = record_forward(net, torch.zeros(1, 3, 6, 6))
        >>> [(operation.function, operation.module) for operation in record.operations]
        [('conv2d', '0'), ('batch_norm', '1'), ('relu', '2')]
        >>> [reader.function for reader in record.readers(record.operations[0].outputs[0])]
        ['batch_norm']
    """
    model = unwrap(model)
    calls = example_calls(example_inputs, error=error)
    with preserved(model), out_of_inference_mode():
        recorder = _Recorder(model)
        for index, call in enumerate(calls):
            copied = call.copied()
            with recorder.recording(index):
                outputs = copied.run(model, error=error)
            recorder.close_call(outputs, copied)
            del outputs
    return recorder.record()


def record_run(model: nn.Module, run: Callable[[], object], *, watch: Watch | None = None) -> ForwardRecord:
    """Record one run of a model that the caller has borrowed, such as a training step, in the modes it is in.

    Args:
        model: The network, unwrapped.
        run: Runs it.
        watch: Is told of each operation before it runs, and may look at tensors; what it computes is not recorded.
    """
    recorder = _Recorder(model, watch)
    with recorder.recording(0):
        outputs = run()
    recorder.close_call(outputs, ())
    return recorder.record()


class _Recorder:
    """The state both modes write to."""

    def __init__(self, model: nn.Module, watch: Watch | None = None) -> None:
        self.watch = watch
        self.operations: list[Operation] = []
        self.values: list[OpenValue] = []
        self.dropouts: list[DropoutUse] = []
        self.tensor_reads: dict[str, list[int]] = {}
        self.unseen_tensors: dict[str, list[str]] = {}
        self.call = 0
        # Kept alive, so that no other tensor can take over an id.
        self._owned_tensors: list[Tensor] = []
        self._owned: dict[int, list[str]] = {}
        self._module_names: dict[int, str] = {}
        for name, module in model.named_modules():
            self._module_names[id(module)] = name
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._owned_tensors.append(tensor)
                    self._owned.setdefault(id(tensor), []).append(f"{name}.{key}" if name else key)
        self._module_calls: list[OpenCall] = []
        self._module_stack: list[int] = []
        # id → (the tensor, version → value). An entry goes when its tensor dies: an id is never mistaken.
        self._alive: dict[int, tuple[weakref.ref[Tensor], dict[int, int]]] = {}
        self._memories = Memories()
        self._given: frozenset[int] = frozenset()
        self._muted = False

    @contextmanager
    def recording(self, call: int) -> Iterator[None]:
        self.call = call
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # A compiled child's names come twice, which the stack of names can bear.
            warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
            stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
            stack.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
            stack.callback(self._module_stack.clear)
            stack.enter_context(_Kernels(self))
            stack.enter_context(_Functions(self))
            yield

    def close_call(self, outputs: Any, inputs: Any) -> None:
        """Settle how the values of one call ended."""
        returned = {id(tensor) for tensor in iter_tensors(outputs)}
        for tensor in iter_tensors(outputs):
            index = self._value_of(tensor)
            if index is not None:
                self.values[index].output = True
        excused = returned | {id(tensor) for tensor in iter_tensors(inputs)}
        if self._survivors(excused):
            gc.collect()  # what only a reference cycle keeps alive has not escaped
        for index in self._survivors(excused):
            self.values[index].escaped = True
        self._alive.clear()
        self._memories.clear()

    def record(self) -> ForwardRecord:
        values = tuple(
            Value(
                index,
                v.shape,
                v.dtype,
                v.producer,
                tuple(v.readers),
                v.output,
                v.escaped,
                tuple(v.unseen),
                v.memory,
                v.strides,
            )
            for index, v in enumerate(self.values)
        )
        return ForwardRecord(
            tuple(self.operations),
            values,
            {name: tuple(readers) for name, readers in self.tensor_reads.items()},
            {name: tuple(kernels) for name, kernels in self.unseen_tensors.items()},
            tuple(
                ModuleCall(c.module, c.call, c.first, c.end, c.inputs, c.outputs, c.arguments, c.parent)
                for c in self._module_calls
            ),
            tuple(self.dropouts),
        )

    def run_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._muted:
            return function(*args, **kwargs)
        given = list(iter_tensors((args, kwargs)))
        elements = (args[:1], args[2:], kwargs) if reads_shape_of_second(function) else (args, kwargs)
        read = list(iter_tensors(elements))
        # Values are looked up before the call: an operation in place changes the version.
        owned = list(dict.fromkeys(name for tensor in read for name in self._owned.get(id(tensor), ())))
        inputs = list(dict.fromkeys(self._value_or_new(tensor) for tensor in read if id(tensor) not in self._owned))
        layer = self._layer_use(function, args, kwargs)
        passing = self._passing(function, args, kwargs)
        versions = [(tensor, _version(tensor)) for tensor in given]
        outer, self._given = self._given, frozenset(id(tensor) for tensor in given)
        try:
            if self.watch is not None:
                self.watch(len(self.operations), function, args, kwargs)
            result = function(*args, **kwargs)
        finally:
            self._given = outer
        made = [tensor for tensor in iter_tensors(result) if id(tensor) not in self._owned]
        p = dropout_probability(function, args, kwargs)
        if p is not None and inputs and made:
            output = self._value_of(made[0])
            # Outside of evaluation it is an operation too, whose value is about to be numbered.
            self._note_dropout(function, p, inputs[0], len(self.values) if output is None else output)
        if not made and reads_metadata(function):
            return result
        if made and all(self._value_of(tensor) in inputs for tensor in made):
            return result  # dropout in evaluation, `.contiguous()` of what is contiguous: the very same value
        if not (inputs or owned):
            return result  # a factory: what it returns is first seen when something reads it
        if passing is not None and not all(tensor.is_floating_point() for tensor in made):
            passing = None  # a cast to integers, the places of maxima
        index = len(self.operations)
        outputs = tuple(self._new_value(tensor, index) for tensor in made if self._value_of(tensor) not in inputs)
        self.operations.append(
            Operation(
                index=index,
                call=self.call,
                kind=layer[0] if layer else "other",
                function=function_name(function),
                module=self._running_module,
                inputs=tuple(inputs),
                outputs=outputs,
                layer=layer[1] if layer else None,
                passing=passing,
                overwrites=tuple(
                    {self._memories.number(tensor) for tensor, before in versions if _version(tensor) != before}
                ),
            )
        )
        for value in inputs:
            self.values[value].readers.append(index)
        for name in owned:
            self.tensor_reads.setdefault(name, []).append(index)
        return result

    def run_kernel(self, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # From scripted code the upper mode is on, and would take the kernel itself for a torch function.
        with self._muting():
            for tensor in iter_tensors((args, kwargs)):
                if id(tensor) not in self._given:
                    self._note_unseen(tensor, str(kernel))
            return kernel(*args, **kwargs)

    def _note_dropout(self, function: Callable[..., Any], p: float, source: int, output: int) -> None:
        end = len(self.operations) + (output != source)
        name = function_name(function)
        self.dropouts.append(DropoutUse(name, self._running_module, self.call, p, source, output, end))

    @property
    def _running_module(self) -> str:
        return self._module_calls[self._module_stack[-1]].module if self._module_stack else ""

    def _note_unseen(self, tensor: Tensor, kernel: str) -> None:
        for name in self._owned.get(id(tensor), ()):
            self.unseen_tensors.setdefault(name, []).append(kernel)
        index = self._value_of(tensor)
        if index is not None:
            self.values[index].unseen.append(kernel)

    def _layer_use(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, LayerUse] | None:
        layer = layer_arguments(function, args, kwargs)
        if layer is None:
            return None
        kind, given = layer
        source = given.get("input")
        tensors = {
            role: None if given[role] is None else tuple(self._owned.get(id(given[role]), ()))
            for role in TENSOR_ROLES
            if role in given
        }
        return kind, LayerUse(
            input=None if source is None or id(source) in self._owned else self._value_or_new(source),
            tensors=tensors,
            groups=int(given.get("groups", 1)),
            training=bool(given.get("training", False)),
            eps=float(given.get("eps", 1e-5)) if kind == "batch_norm" else 0.0,
            reads_padding=kind.startswith("conv") and reads_padding(kind, given),
        )

    def _passing(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Passing | None:
        """Keep what it takes to repeat a call, unless it depends on anything but the places of values."""
        kind = passing_kind(function)
        if kind is None:
            return None
        given = list(iter_tensors((args, kwargs)))
        if not given or any(id(tensor) in self._owned or not tensor.is_floating_point() for tensor in given):
            return None

        def refer(tensor: Tensor) -> ValueRef:
            return ValueRef(self._value_or_new(tensor))

        return Passing(kind, function, map_tensors(args, refer), map_tensors(kwargs, refer))

    def _value_of(self, tensor: Tensor) -> int | None:
        entry = self._alive.get(id(tensor))
        return None if entry is None else entry[1].get(_version(tensor))

    def _value_or_new(self, tensor: Tensor) -> int:
        index = self._value_of(tensor)
        if index is not None:
            return index
        changed = id(tensor) in self._alive  # through a view: it now shows what that operation made
        index = self._new_value(tensor, None)
        if changed and self.values[index].memory >= 0:
            for other in self.values[:index]:
                if other.memory == self.values[index].memory:
                    other.unseen.append("another view of the same memory,")
        return index

    def _new_value(self, tensor: Tensor, producer: int | None) -> int:
        index = len(self.values)
        self.values.append(OpenValue(tuple(tensor.shape), tensor.dtype, producer))
        key, alive = id(tensor), self._alive
        if key not in alive:
            alive[key] = (weakref.ref(tensor, lambda _: alive.pop(key, None)), {})
        alive[key][1][_version(tensor)] = index
        self.values[index].memory = self._memories.number(tensor)
        if tensor.layout == torch.strided and not tensor.is_nested:
            self.values[index].strides = tuple(tensor.stride())
        return index

    def _survivors(self, excused: Iterable[int]) -> list[int]:
        living = [entry[0]() for key, entry in list(self._alive.items()) if key not in excused]
        found = [self._value_of(tensor) for tensor in living if tensor is not None]
        return [index for index in found if index is not None and self.values[index].producer is not None]

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        name = self._module_names.get(id(module), type(module).__name__)
        with self._muting():  # looking at a tensor's version is a torch function, too
            inputs = [self._value_or_new(tensor) for tensor in iter_tensors(args) if id(tensor) not in self._owned]
        parent = self._module_stack[-1] if self._module_stack else None
        self._module_stack.append(len(self._module_calls))
        self._module_calls.append(OpenCall(name, self.call, len(self.operations), tuple(inputs), parent))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._module_stack:
            left = self._module_calls[self._module_stack.pop()]
            with self._muting():
                made = [self._value_of(tensor) for tensor in iter_tensors(output)]
            left.arguments = len(args)
            left.end, left.outputs = len(self.operations), tuple(index for index in made if index is not None)

    @contextmanager
    def _muting(self) -> Iterator[None]:
        outer, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = outer


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.run_function(func, args, kwargs or {})


class _Kernels(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports dynamo and sympy for seconds; compiled code runs eagerly here anyway

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.run_kernel(func, args, kwargs or {})


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
