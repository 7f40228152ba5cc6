"""Layers with their norm and activation, as the knobs say that all networks here have."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError, nearest
from bn_lightning.layers.base import require_options
from bn_lightning.layers.registry import GROUP, VARIANTS
from bn_lightning.layers.target import batch_norm_layer
from bn_lightning.networks.activations import build_activation
from bn_lightning.networks.initialization import initialize_, require_initialization

__all__ = ["LayerBuilder"]

_OF_TORCH = ("eps", "momentum", "track_running_stats")


class LayerBuilder:
    """Build the layers of one network.

    Args:
        norm: ``"batch"`` for torch's own, a variant's name or ``"group"`` as for `convert_batch_norm`, or ``None``.
        norm_options: The variant's settings, and ``eps``, ``momentum`` (weight of the new batch) and
            ``track_running_stats``.
        norm_place: ``"before"`` or ``"after"`` the activation. A layer right before its norm has no bias, since the
            norm has its own.
        affine: What norms learn: ``True`` for scale and shift, ``"scale"``, ``"shift"``, or ``False`` for neither.
        activation: ``relu, rrelu, prelu, elu, maxout`` (of two pieces)``, sigmoid, tanh`` or ``none``.
        dropout: Probability, where a network has dropout.
        init: ``he, he_fan_out, glorot`` or ``orthogonal``, see `initialize_`. The head, which no activation follows,
            keeps torch's own initialization where the rule is He's. For LSUV call `lsuv_` on the network.
        bias: Whether the head and layers that no norm follows at once have one.

    Raises:
        BatchNormError: If a name or an option is unknown, or they do not go together.

    Example:
        >>> LayerBuilder(norm="ghost", norm_place="after", activation="tanh").linear_block(4, 8)
        Sequential(
          (linear): Linear(in_features=4, out_features=8, bias=True)
          (activation): Tanh()
          (norm): GhostBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True,
            virtual_batch_size=32)
        )
    """

    def __init__(
        self,
        *,
        norm: str | None = "batch",
        norm_options: Mapping[str, Any] | None = None,
        norm_place: str = "before",
        affine: bool | str = True,
        activation: str = "relu",
        dropout: float = 0.0,
        init: str = "he",
        bias: bool = True,
    ) -> None:
        _require_one_of("norm", norm, ("batch", *VARIANTS, GROUP, None))
        _require_one_of("norm_place", norm_place, ("before", "after"))
        _require_one_of("affine", affine, (True, False, "scale", "shift"))
        require_initialization(init)
        build_activation(activation, 1)
        if norm == GROUP and affine == "shift":
            raise BatchNormError("torch's group norm cannot go backward through a shift without a scale: affine=True.")
        if not 0 <= dropout < 1:
            raise BatchNormError(f"dropout is the probability that a value is dropped, 0 ≤ dropout < 1, got {dropout}.")
        self.norm_first = norm_place == "before"
        self.bias = bias and (norm is None or not self.norm_first)
        self._head_bias = bias
        self._norm, self._affine, self._activation = norm, affine, activation
        self._dropout, self._init = dropout, init
        self._pieces = 2 if activation == "maxout" else 1
        given = dict(norm_options or {})
        self._of_torch = {name: given.pop(name) for name in _OF_TORCH if name in given}
        if norm is None and norm_options:
            raise BatchNormError(f"norm_options={dict(norm_options)} are for a norm=, such as 'ghost', and it is None.")
        if norm == "batch":
            require_options("norm='batch'", dict(norm_options or {}), _OF_TORCH)
        self._variant = None if norm in (None, "batch") else batch_norm_layer(str(norm), **given)

    def linear_block(self, in_features: int, out_features: int) -> nn.Sequential:
        """Build ``linear``, ``norm`` and ``activation`` in their order, and ``dropout``: what there is of them."""
        layer = nn.Linear(in_features, out_features * self._pieces, bias=self.bias)
        initialize_(layer, self._init)
        return self._block({"linear": layer}, out_features, nn.BatchNorm1d, {"dropout": self.dropout()})

    def conv_block(self, in_channels: int, out_channels: int) -> nn.Sequential:
        """Build ``conv``, which is 3 × 3 and keeps the resolution, then ``norm`` and ``activation`` in their order."""
        layer = self.conv(in_channels, out_channels * self._pieces, bias=self.bias)
        return self._block({"conv": layer}, out_channels, nn.BatchNorm2d, {})

    def conv(self, in_channels: int, out_channels: int, stride: int = 1, *, kernel: int = 3, bias: bool) -> nn.Conv2d:
        """Build a convolution, padded with zeros."""
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)
        initialize_(conv, self._init)
        return conv

    def norm(self, channels: int, plain: type[_BatchNorm] = nn.BatchNorm2d) -> nn.Module:
        """Build a norm, of this class if it is torch's own; an identity if there is none."""
        if self._norm is None:
            return nn.Identity()
        kind: Callable[..., nn.Module] = self._variant or plain
        # Only the variants know of one without the other.
        affine = self._affine if self._norm in VARIANTS else self._affine is not False
        norm = kind(channels, affine=affine, **self._of_torch)
        for parameter, left_out in (("weight", "shift"), ("bias", "scale")):
            if self._affine == left_out:
                norm.register_parameter(parameter, None)
        return norm

    def activation(self, channels: int, *, inplace: bool = True) -> nn.Module:
        """Build the activation, whose output has so many channels."""
        return build_activation(self._activation, channels, inplace=inplace)

    def dropout(self) -> nn.Module:
        """Build the dropout; an identity if there is none."""
        return nn.Dropout(self._dropout) if self._dropout else nn.Identity()

    def head(self, in_features: int, out_features: int) -> nn.Linear:
        """Build the last layer."""
        layer = nn.Linear(in_features, out_features, bias=self._head_bias)
        if not self._init.startswith("he"):
            initialize_(layer, self._init)
        return layer

    def _block(
        self, layer: dict[str, nn.Module], channels: int, plain: type[_BatchNorm], tail: dict[str, nn.Module]
    ) -> nn.Sequential:
        norm = {"norm": self.norm(channels * self._pieces if self.norm_first else channels, plain)}
        activation: dict[str, nn.Module] = {"activation": self.activation(channels)}
        parts = {**layer, **norm, **activation, **tail} if self.norm_first else {**layer, **activation, **norm, **tail}
        return nn.Sequential(OrderedDict((key, part) for key, part in parts.items() if type(part) is not nn.Identity))


def _require_one_of(knob: str, given: object, known: Iterable[object]) -> None:
    known = list(known)
    if given not in known:
        names = [name for name in known if isinstance(name, str)]
        raise BatchNormError(
            f"there is no {knob}={given!r}{nearest(str(given), names)}; there are {', '.join(map(repr, known))}."
        )
