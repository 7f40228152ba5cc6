"""Watch activations without Lightning."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.monitoring.snapshot import ActivationSnapshot
from bn_lightning.monitoring.statistics import ChannelStatistics
from bn_lightning.monitoring.watch import ActivationWatch
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ObservedActivations", "observe_activations"]


@contextmanager
def observe_activations(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    gradients: bool = False,
    histograms: bool = False,
) -> Iterator["ObservedActivations"]:
    """Measure what each layer puts out while the block runs; all calls in it are one sample.

    The network is not changed, and its hooks are gone afterwards, also after an exception. In a distributed run this
    is the process's own share. A network compiled before the block keeps its new hooks from firing.

    Args:
        model: The network.
        include: ``fnmatch`` patterns on layer names, of which at least one has to match; empty means every layer that
            has no children and is neither Identity, dropout, loss nor metric. A full name picks that very module.
        exclude: Patterns of which none may match.
        gradients: Measure the gradients that flow back into the outputs too; a backward pass in the block makes them.
        histograms: Count values by sign and power of two too; they are in the snapshot.

    Yields:
        The observation. Reading it copies one buffer from the device.

    Raises:
        BatchNormError: If a pattern matches no layer, or the patterns leave none.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> with observe_activations(net, include=("1",)) as activations:
        ...     _ = net(torch.zeros(4, 2))
        >>> print(activations.table())
        activations of 1 layer, in order of execution
          layer   mean   std   min   max   zeros %   values   remark
         ──────────────────────────────────────────────────────────────
          1          0     0     0     0       100        8   all zero
        zeros %: values that are exactly 0; std over all values of the layer, correction=0
        layers with a remark: 1 of 1
    """
    watch = ActivationWatch(gradients=gradients, histograms=histograms)
    try:
        watch.install(model, include, exclude)
        watch.sampling = True
        yield ObservedActivations(watch)
    finally:
        watch.remove()


class ObservedActivations(Tabled):
    """What `observe_activations` has seen, up to now while its block runs."""

    def __init__(self, watch: ActivationWatch) -> None:
        self._watch = watch

    def snapshot(self) -> ActivationSnapshot:
        """Return the sample so far, as a plain value."""
        return self._watch.read()

    def table(self) -> Table:
        """Return one row a layer, in order of execution; no rows if the model was not called."""
        return self.snapshot().table(none_called="the model was not called inside the with block")

    def to_dict(self) -> dict[str, dict[str, int | float | str]]:
        """Return the fields of `LayerStatistics` by layer."""
        return self.snapshot().to_dict()

    def gradients(self) -> ActivationSnapshot:
        """Return the gradients that flowed back into the outputs.

        Raises:
            BatchNormError: If they were not asked for.
        """
        found = self.snapshot().gradients
        if found is None:
            raise BatchNormError("gradients were not measured: observe_activations(…, gradients=True) does.")
        return found

    def profile(self) -> "Figure":
        """Draw mean ± std along the network; see `depth_profile`."""
        from bn_lightning.monitoring.pictures import depth_profile

        return depth_profile(self.snapshot())

    def channels(self, layer: str) -> ChannelStatistics:
        """Return one layer channel by channel.

        Raises:
            BatchNormError: If the layer is not watched.
        """
        return self.snapshot().channels(layer)

    def figure(self, stat: str = "std") -> "Figure":
        """Draw a statistic of every channel; see `ActivationSnapshot.figure`.

        Raises:
            BatchNormError: If there is no such statistic, or nothing was measured.
        """
        return self.snapshot().figure(stat)
