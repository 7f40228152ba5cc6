"""What the first layer with weights is given."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bn_lightning.auditing.observer import Observer, each_call
from bn_lightning.functional import ChannelMoments, batch_moments

__all__ = ["FirstInput", "FirstInputObserver"]

_NORMALIZING = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
_WEIGHTED = (_ConvNd, nn.Linear)


@dataclass(frozen=True, slots=True)
class FirstInput:
    """Each channel of the first convolution's input, or each feature of the first linear layer's.

    Attributes:
        layer: Name of that layer.
        kind: ``"channels"`` or ``"features"``.
        mean: (C,), float64 on the CPU.
        std: (C,), correction=0.
        range: Largest less smallest value, (C,).
    """

    layer: str
    kind: str
    mean: Tensor
    std: Tensor
    range: Tensor


class FirstInputObserver(Observer):
    """Sees the first call of a convolution or linear layer in each batch, unless a normalization comes before."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, ChannelMoments, Tensor, Tensor]] = {}
        self._pending: tuple[str, str, ChannelMoments, Tensor, Tensor] | None = None
        self._is_open = True

    @contextmanager
    def watching(self, network: nn.Module, layers: Mapping[str, _BatchNorm], name: str) -> Iterator[None]:
        """Watch one pass."""
        kinds = (*_NORMALIZING, *_WEIGHTED)
        with each_call({name: each for name, each in network.named_modules() if isinstance(each, kinds)}, self._see):
            yield

    def begin_batch(self) -> None:
        """Forget a batch that failed."""
        self._pending, self._is_open = None, True

    def end_batch(self) -> None:
        """Keep the batch."""
        if self._pending is not None:
            name, kind, moments, low, high = self._pending
            if name in self._seen:
                _, before, lowest, highest = self._seen[name]
                moments, low, high = before.merge(moments), low.minimum(lowest), high.maximum(highest)
            self._seen[name] = (kind, moments, low, high)
        self.begin_batch()

    def first_input(self) -> FirstInput | None:
        """Tell what was seen; ``None`` if a normalization comes first, or if it differs from batch to batch."""
        if len(self._seen) != 1:
            return None
        ((name, (kind, moments, low, high)),) = self._seen.items()
        std = moments.var(correction=0).sqrt()
        mean, std, spread = (value.cpu().double() for value in (moments.mean, std, high - low))
        return FirstInput(name, kind, mean, std, spread)

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if isinstance(module, _NORMALIZING) or not x.is_floating_point() or not x.numel():
            return
        if isinstance(module, nn.Linear):
            kind, values = "features", x.flatten(0, -2) if x.dim() > 1 else x[None]
        else:
            assert isinstance(module, _ConvNd)
            dimensions = module.weight.dim()
            # A convolution also takes one example without a first axis for it.
            kind, values = "channels", x if x.dim() == dimensions else x[None]
        apart = [axis for axis in range(values.dim()) if axis != 1]
        self._pending = name, kind, batch_moments(values), values.amin(apart), values.amax(apart)
