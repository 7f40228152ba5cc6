"""Read every layer's output while a network runs, without a host sync."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bn_lightning.functional.activation import Row, activation_statistics
from bn_lightning.internals import compiled_original
from bn_lightning.monitoring.buffer import Layout, StatisticsBuffer
from bn_lightning.monitoring.channels import ChannelAxes, find_tensor
from bn_lightning.monitoring.layers import unmeasurable, watchable_layers
from bn_lightning.monitoring.processes import ProcessMerge
from bn_lightning.monitoring.snapshot import NOT_CALLED, ActivationSnapshot

__all__ = ["ActivationWatch"]

# A layer whose channel count keeps changing has its sequence where channels are looked for.
_MOST_CHANNEL_COUNTS = 8
_COMPILED = f"{NOT_CALLED}, or compiled before the taps were set: watch first, then torch.compile"
_SCRIPTED = "compiled by torch.jit, which takes no hooks: watch the network before torch.jit.script"
_UNKNOWN_AXIS = "measured as one channel: which axis holds its channels is not known"
_EVER_NEW_COUNTS = f"measured as one channel after {_MOST_CHANNEL_COUNTS} different channel counts"


class ActivationWatch:
    """Taps on the layers of a network, and the sample they have collected.

    A tap returns at once unless ``sampling`` is on. All calls of a layer since the last `flush` are one sample:
    micro-batches, shared modules and repeated calls merge exactly. Statistics stay on the device until they are read.

    Args:
        statistics: What measures a tensor: `activation_statistics`, or a `FusedStatistics`.

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

    def __init__(self, statistics: Callable[..., Tensor] = activation_statistics) -> None:
        self.sampling = False
        self._measured = statistics
        self._buffer = StatisticsBuffer()
        self._processes = ProcessMerge()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._names: tuple[str, ...] = ()
        self._absence = NOT_CALLED
        self._untapped: dict[str, str] = {}
        self._axes = ChannelAxes()
        self._order: dict[str, None] = {}
        self._called: set[str] = set()
        self._reasons: dict[str, str] = {}

    def install(self, model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        """Put a tap on each layer that `watchable_layers` picks; taps of an earlier call go.

        A layer that takes no tap stays in every sample, with the reason.

        Raises:
            BatchNormError: If a pattern matches no layer, or the patterns leave none.
        """
        layers = watchable_layers(model, include, exclude)
        self.remove()
        self._names = tuple(layers)
        compiled = compiled_original(model) is not None
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

    def measure(self, name: str, layer: nn.Module, args: object, output: object) -> None:
        """Add one output of a layer to the sample; an output that cannot be measured leaves its reason."""
        self._order.setdefault(name)
        self._called.add(name)
        tensor = find_tensor(output)
        reason = f"its output holds no tensor ({type(output).__name__})" if tensor is None else unmeasurable(tensor)
        if tensor is None or reason:
            self._reasons[name] = reason
            return
        # Outside inference mode: what is written there could not be written to again later.
        with torch.inference_mode(False), torch.no_grad():
            self._buffer.add(name, self._statistics(name, layer, args, tensor))

    def read(self) -> ActivationSnapshot:
        """Copy the sample so far to the host, in one transfer."""
        return self._snapshot(self._buffer.used.cpu(), self._buffer.layout)

    def flush(self, *, across_processes: bool = False) -> ActivationSnapshot:
        """Read the sample and begin a new one.

        Args:
            across_processes: Merge the samples of all processes of ``torch.distributed``, if it is initialized. Every
                process has to call it then.
        """
        with torch.inference_mode(False), torch.no_grad():
            values, layout = self._buffer.used, self._buffer.layout
            if across_processes:
                values, layout = self._processes.merge(values, layout)
            snapshot = self._snapshot(values.cpu(), layout)
            self._buffer.clear()
        self._axes.clear()
        self._called, self._reasons = set(), {}
        return snapshot

    def _statistics(self, name: str, layer: nn.Module, args: object, tensor: Tensor) -> Tensor:
        if tensor.dim() < 2:
            return self._measured(tensor)
        axis = self._axes.of(layer, args, tensor)
        if axis is None:
            self._reasons[name] = _UNKNOWN_AXIS
        elif (name, tensor.shape[axis]) not in self._buffer.slots:
            known = sum(layer_name == name for layer_name, _ in self._buffer.slots)
            if known >= _MOST_CHANNEL_COUNTS:
                axis, self._reasons[name] = None, _EVER_NEW_COUNTS
        return self._measured(tensor.reshape(-1)) if axis is None else self._measured(tensor, channel_dim=axis)

    def _snapshot(self, values: Tensor, layout: Layout) -> ActivationSnapshot:
        blocks: dict[str, list[Tensor]] = {}
        columns = values.split([channels for _, channels in layout], dim=1) if layout else ()
        for (layer, _), block in zip(layout, columns, strict=True):
            if block[Row.COUNT].any():
                blocks.setdefault(layer, []).append(block)
        nothing = values.new_empty(len(Row), 0)
        names = dict.fromkeys([*self._order, *(layer for layer, _ in layout), *self._names])
        seen = {*blocks, *self._called, *self._untapped}
        absent = [name for name in names if name not in seen]
        return ActivationSnapshot(
            {name: torch.cat(blocks.get(name, [nothing]), dim=1) for name in names},
            {**dict.fromkeys(absent, self._absence), **self._untapped, **self._reasons},
            frozenset(absent),
        )


class _Tap:
    """A forward hook that costs one attribute look-up while nothing is sampled."""

    __slots__ = ("_name", "_watch")

    def __init__(self, watch: ActivationWatch, name: str) -> None:
        self._watch = watch
        self._name = name

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self._watch.sampling:
            self._watch.measure(self._name, module, args, output)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy of the network, such as an average of its weights, is not what is being watched.
        return _NoTap, ()


class _NoTap:
    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        return
