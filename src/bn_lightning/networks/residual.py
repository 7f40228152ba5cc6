"""Residual networks, post-activation or pre-activation, with or without normalization."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers.skip_init import SkipInit
from bn_lightning.networks.layer_builder import LayerBuilder

__all__ = ["ResidualNetwork"]


class ResidualNetwork(nn.Module):
    """Classify images with stages of residual blocks of two convolutions.

    Every stage after the first halves the resolution. Post-activation blocks are conv-norm-activation-conv-norm plus a
    skip, then the activation; pre-activation blocks are norm-activation-conv-norm-activation-conv plus a skip with
    nothing behind, and one norm and activation come after the last of them. With the norm after the activation the two
    change places, also where the activation follows the sum. Where a block changes the channels or the resolution, the
    skip is a 1 × 1 convolution (pre-activation: of the activated input).

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        widths: Channels of each stage.
        blocks: Residual blocks a stage; the depth is 2 · blocks · stages + 2.
        preactivation: Whether norm and activation come before each convolution.
        skip_init: Initial factor of `SkipInit` at the end of each branch, usually 0 and with ``norm=None``; ``None``
            for no such factor.
        norm, norm_options, norm_place, affine, activation, init: See `LayerBuilder`; there is no maxout, which changes
            the number of channels.
        dropout: Probability, before the head.

    Shape:
        Input (N, in_channels, H, W), output (N, num_classes).

    Raises:
        BatchNormError: As `LayerBuilder`, and for maxout.

    Example:
        >>> import torch
        >>> ResidualNetwork(widths=(8, 16), blocks=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> network = ResidualNetwork(preactivation=True, norm=None, skip_init=0.0)  # normalization-free

    Reference:
        He, Zhang, Ren & Sun, arXiv:1512.03385, §3.3 and Fig. 5 (left); pre-activation: arXiv:1603.05027, Fig. 1 (b);
        De & Smith, arXiv:2002.10444.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 2,
        preactivation: bool = False,
        skip_init: float | None = None,
        norm: str | None = "batch",
        norm_options: Mapping[str, Any] | None = None,
        norm_place: str = "before",
        affine: bool | str = True,
        activation: str = "relu",
        dropout: float = 0.0,
        init: str = "he_fan_out",
    ) -> None:
        super().__init__()
        if activation == "maxout":
            raise BatchNormError(
                "a residual network has no maxout: its sums need as many channels behind the activation as before."
            )
        build = LayerBuilder(
            norm=norm,
            norm_options=norm_options,
            norm_place=norm_place,
            affine=affine,
            activation=activation,
            dropout=dropout,
            init=init,
        )
        stem = build.conv(in_channels, widths[0], bias=build.bias)
        self.stem = nn.Sequential(stem)
        if not preactivation:
            self.stem.extend(_norm_and_activation(build, widths[0], inplace=True))
        kind = _PreActivationBlock if preactivation else _Block
        stages, channels = [], widths[0]
        for index, width in enumerate(widths):
            stage = []
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(kind(build, channels, width, stride, skip_init))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(*_norm_and_activation(build, channels)) if preactivation else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = build.dropout()
        self.head = build.head(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, num_classes)."""
        features = self.pool(self.last(self.stages(self.stem(images)))).flatten(1)
        return self.head(self.dropout(features))


class _Block(nn.Module):
    def __init__(
        self, build: LayerBuilder, in_channels: int, out_channels: int, stride: int, skip_init: float | None
    ) -> None:
        super().__init__()
        self.norm_first = build.norm_first
        self.conv1 = build.conv(in_channels, out_channels, stride, bias=build.bias)
        self.bn1, self.relu1 = build.norm(out_channels), build.activation(out_channels)
        self.conv2 = build.conv(out_channels, out_channels, bias=build.bias)
        self.bn2, self.relu2 = build.norm(out_channels), build.activation(out_channels)
        self.scale = nn.Identity() if skip_init is None else SkipInit(skip_init)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.skip = nn.Sequential(build.conv(in_channels, out_channels, stride, kernel=1, bias=False))
            if self.norm_first:  # else the norm comes after the sum
                self.skip.append(build.norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
            return self.relu2(self.scale(branch) + self.skip(x))
        branch = self.conv2(self.bn1(self.relu1(self.conv1(x))))
        return self.bn2(self.relu2(self.scale(branch) + self.skip(x)))


class _PreActivationBlock(nn.Module):
    def __init__(
        self, build: LayerBuilder, in_channels: int, out_channels: int, stride: int, skip_init: float | None
    ) -> None:
        super().__init__()
        self.enter1 = nn.Sequential(*_norm_and_activation(build, in_channels))
        self.conv1 = build.conv(in_channels, out_channels, stride, bias=build.bias)
        self.enter2 = nn.Sequential(*_norm_and_activation(build, out_channels))
        self.conv2 = build.conv(out_channels, out_channels, bias=build.bias)
        self.scale = nn.Identity() if skip_init is None else SkipInit(skip_init)
        same = stride == 1 and in_channels == out_channels
        self.skip = None if same else build.conv(in_channels, out_channels, stride, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter1(x)
        branch = self.scale(self.conv2(self.enter2(self.conv1(entered))))
        return branch + (x if self.skip is None else self.skip(entered))


def _norm_and_activation(build: LayerBuilder, channels: int, *, inplace: bool = False) -> tuple[nn.Module, nn.Module]:
    """Build both in their order; not in place before a branch, since the skip reads the same values."""
    norm, activation = build.norm(channels), build.activation(channels, inplace=inplace)
    return (norm, activation) if build.norm_first else (activation, norm)
