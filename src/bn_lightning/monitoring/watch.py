"""Read every layer's output while a network runs, without a host sync."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bn_lightning.functional.activation import activation_statistics
from bn_lightning.functional.log_histogram import BINS, log2_histogram
from bn_lightning.internals import in_backward, is_compiled, never_compiled
from bn_lightning.monitoring.buffer import StatisticsBuffer
from bn_lightning.monitoring.channels import ChannelAxes, find_tensor
from bn_lightning.monitoring.compiled import CompiledTap, compiling, record_in_graph
from bn_lightning.monitoring.layers import unmeasurable, watchable_layers
from bn_lightning.monitoring.processes import ProcessMerge
from bn_lightning.monitoring.sample import SampleNotes, describe_sample, of_gradient, rescaled_gradients
from bn_lightning.monitoring.snapshot import NOT_CALLED, ActivationSnapshot
from bn_lightning.tracing.nested import iter_tensors

__all__ = ["ActivationWatch"]

# A layer whose channel count keeps changing has its sequence where channels are looked for.
_MOST_CHANNEL_COUNTS = 8
_COMPILED = (
    f"{NOT_CALLED}, or compiled before the taps were set: watch first, then torch.compile, or compile anew after "
    "torch.compiler.reset()"
)
_SCRIPTED = "compiled by torch.jit, which takes no hooks: watch the network before torch.jit.script"
_UNKNOWN_AXIS = "measured as one channel: which axis holds its channels is not known"
_EVER_NEW_COUNTS = f"measured as one channel after {_MOST_CHANNEL_COUNTS} different channel counts"
_CREATES_GRAPH = "gradients with create_graph=True are not counted"
_FIRST_ONLY = "only the first tensor of its output is measured, {} other{} not"
_NO_GRADIENT_IN_GRAPHS = "torch.compile lets no gradient out of its graphs"


class ActivationWatch:
    """Taps on the layers of a network, and the sample they have collected.

    A tap returns at once unless ``sampling`` is on. All calls of a layer since the last `flush` are one sample:
    micro-batches, shared modules and repeated calls merge exactly, and what activation checkpointing recomputes is not
    counted again. Statistics stay on the device until they are read. Inside ``torch.compile`` a tap breaks no graph; it
    has to be there before the network first runs.

    Args:
        gradients: Measure the gradient that flows back into each output too.
        histograms: Count each output's values by sign and power of two too.
        statistics: What measures one activation; see `activation_statistics`.

    Attributes:
        sampling: Whether the taps measure.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> watch = ActivationWatch()
        >>> watch.install(net)
        >>> watch.sampling = True
        >>> _ = net(torch.zeros(4, 2))
        >>> watch.remove()
        >>> watch.flush().to_dict()["1"]["count"]
        12
    """

    def __init__(
        self,
        *,
        gradients: bool = False,
        histograms: bool = False,
        statistics: Callable[..., Tensor] = activation_statistics,
    ) -> None:
        self.sampling = False
        self.gradients = gradients
        self.histograms = histograms
        self.statistics = statistics
        self._buffer = StatisticsBuffer()
        self._counts: Tensor | None = None
        self._processes = ProcessMerge()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._layers: dict[str, nn.Module] = {}
        self._places: dict[str, int] = {}
        self._absence = NOT_CALLED
        self._untapped: dict[str, str] = {}
        self._axes = ChannelAxes()
        self._notes = SampleNotes()
        self._order: dict[str, None] = {}

    @property
    def has_calls(self) -> bool:
        """Whether a layer has run in this sample."""
        return bool(self._notes.called)

    def install(self, model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        """Put a tap on each layer that `watchable_layers` picks; taps and samples of an earlier call go.

        A layer that takes no tap stays in every sample, with the reason.

        Raises:
            BatchNormError: If a pattern matches no layer, or the patterns leave none.
        """
        layers = watchable_layers(model, include, exclude)
        self.remove()
        self._layers, self._order, self._notes = layers, {}, SampleNotes()
        self._places = {name: place for place, name in enumerate(layers)}
        self._counts = None
        self._buffer = StatisticsBuffer(device=next((tensor.device for tensor in model.parameters()), None))
        compiled = is_compiled(model) or any(map(is_compiled, model.modules()))
        self._absence = _COMPILED if compiled else NOT_CALLED
        self._untapped = {
            name: _SCRIPTED for name, layer in layers.items() if isinstance(layer, torch.jit.ScriptModule)
        }
        for name, layer in layers.items():
            if name not in self._untapped:
                self._handles.append(layer.register_forward_hook(_Tap(self, name)))

    def remove(self) -> None:
        """Take the taps off and stop sampling; what was collected stays."""
        self.sampling = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._axes.clear()

    @never_compiled
    def measure(self, name: str, layer: nn.Module, args: object, output: object) -> None:
        """Add one output of a layer to the sample; an output that cannot be measured leaves its reason."""
        self._order.setdefault(name)
        with self._telling(name):
            self._measure(name, layer, args, output)

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """Turn an exception into a reason: what nobody thought of must not stop a training."""
        try:
            yield
        except Exception as error:
            self._notes.add(name, reason=f"it could not be measured: {type(error).__name__}: {error}")

    def _measure(self, name: str, layer: nn.Module, args: object, output: object) -> None:
        tensor = find_tensor(output)
        reason = f"its output holds no tensor ({type(output).__name__})" if tensor is None else unmeasurable(tensor)
        if tensor is None or reason:
            self._notes.add(name, reason=reason)
            return
        if tensor is not output and (others := _floating(output) - 1) > 0:
            self._notes.reasons[name] = _FIRST_ONLY.format(others, "" if others == 1 else "s")
        axis = self._axis(name, layer, args, tensor)
        if not in_backward():  # where checkpointing computes again what was counted already
            self._add(name, tensor, axis)
            self._count(name, tensor)
        if self.gradients and tensor.requires_grad:
            tensor.register_hook(partial(self._measure_gradient, of_gradient(name), axis))

    def measure_compiled(self, layer: str, output: Tensor) -> None:
        """Add one output that a compiled graph has handed over."""
        self._order.setdefault(layer)
        reason = unmeasurable(output)
        if self.gradients:
            self._notes.add(of_gradient(layer), reason=_NO_GRADIENT_IN_GRAPHS)
        if reason:
            self._notes.add(layer, reason=reason)
        elif not in_backward():
            with self._telling(layer):
                self._add(layer, output, self._axis(layer, self._layers[layer], (), output))
                self._count(layer, output)

    def read(self) -> ActivationSnapshot:
        """Copy the sample so far to the host, in one transfer."""
        return self._start(across_processes=False)()

    def flush(self, *, across_processes: bool = False) -> ActivationSnapshot:
        """Read the sample and begin a new one.

        Args:
            across_processes: Merge the samples of all processes of ``torch.distributed``, if it is initialized. Every
                process has to call it then.
        """
        return self.start_flush(across_processes=across_processes)()

    def start_flush(
        self, *, step: int | None = None, across_processes: bool = False, gradient_scale: Tensor | None = None
    ) -> Callable[[], ActivationSnapshot]:
        """Start to copy the sample to the host and begin a new one; nothing waits for the device.

        Args:
            step: The optimizer step, if there is such a thing.
            across_processes: As in `flush`; every process has to ask for the snapshot at the same time, too.
            gradient_scale: What the loss was multiplied by before the backward pass; gradients are divided by it.

        Returns:
            What gives the snapshot.
        """
        finish = self._start(step=step, across_processes=across_processes, gradient_scale=gradient_scale)
        with torch.inference_mode(False), torch.no_grad():
            self._buffer.clear()
            if self._counts is not None:
                self._counts.zero_()
        self._notes = SampleNotes()
        self._axes.clear()
        return finish

    def _start(
        self, *, across_processes: bool, step: int | None = None, gradient_scale: Tensor | None = None
    ) -> Callable[[], ActivationSnapshot]:
        notes, order, layers = self._notes, [*self._order, *self._layers], list(self._layers)
        with torch.inference_mode(False), torch.no_grad():
            values, layout = self._buffer.used, self._buffer.layout
            if gradient_scale is not None and layout:
                values = rescaled_gradients(values, layout, gradient_scale)
            counts = self._counts
            if counts is None:
                counts = values.new_zeros(len(layers) if self.histograms else 0, BINS, dtype=torch.int64)
            finish = self._processes.start(values, layout, counts, across_processes=across_processes)

        def snapshot() -> ActivationSnapshot:
            values, layout, counts = finish()
            return describe_sample(
                values,
                layout,
                notes,
                order,
                untapped=self._untapped,
                absence=self._absence,
                kinds={name: type(layer).__name__ for name, layer in self._layers.items()},
                gradients=self.gradients,
                histograms=dict(zip(layers, counts.long(), strict=True)) if self.histograms else {},
                step=step,
            )

        return snapshot

    @never_compiled
    def _measure_gradient(self, name: str, axis: int | None, gradient: Tensor) -> None:
        if not self.sampling:
            return
        # A gradient that is itself differentiated, as for a penalty, is not the loss's.
        reason = _CREATES_GRAPH if torch.is_grad_enabled() else unmeasurable(gradient).replace("output", "gradient")
        if reason:
            self._notes.add(name, reason=reason)
            return
        with self._telling(name):
            self._add(name, gradient, axis)

    def _add(self, name: str, tensor: Tensor, axis: int | None) -> None:
        self._notes.add(name, tensor.dtype)
        # Outside inference mode: what is written there could not be written to again later.
        with torch.inference_mode(False), torch.no_grad():
            if tensor.dim() >= 2 and axis is None:
                tensor = tensor.reshape(-1)
            self._buffer.add(name, self.statistics(tensor, **({} if axis is None else {"channel_dim": axis})))

    def _count(self, name: str, tensor: Tensor) -> None:
        if not self.histograms:
            return
        with torch.inference_mode(False), torch.no_grad():
            if self._counts is None:
                self._counts = torch.zeros(len(self._layers), BINS, dtype=torch.int64, device=tensor.device)
            counts = self._counts[self._places[name]]
            counts += log2_histogram(tensor).to(counts.device, non_blocking=True)

    def _axis(self, name: str, layer: nn.Module, args: object, tensor: Tensor) -> int | None:
        """Tell where the channels are; ``None`` if all of it is one channel."""
        if tensor.dim() < 2:
            return None
        axis = self._axes.of(layer, args, tensor)
        if axis is None:
            self._notes.reasons[name] = _UNKNOWN_AXIS
        elif (name, tensor.shape[axis]) not in self._buffer.slots:
            known = sum(layer_name == name for layer_name, _ in self._buffer.slots)
            if known >= _MOST_CHANNEL_COUNTS:
                axis, self._notes.reasons[name] = None, _EVER_NEW_COUNTS
        return axis


def _floating(output: object) -> int:
    return sum(tensor.is_floating_point() for tensor in iter_tensors(output))


class _Tap:
    """A forward hook that costs one attribute look-up while nothing is sampled."""

    __slots__ = ("_compiled", "_name", "_watch")

    def __init__(self, watch: ActivationWatch, name: str) -> None:
        self._watch = watch
        self._name = name
        self._compiled = CompiledTap(partial(watch.measure_compiled, name))

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self._watch.sampling:
            if not compiling():
                self._watch.measure(self._name, module, args, output)
            elif (tensor := find_tensor(output)) is not None:
                record_in_graph(self._compiled.key, tensor)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy of the network, such as an average of its weights, is not what is being watched.
        return _NoTap, ()


class _NoTap:
    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        return
