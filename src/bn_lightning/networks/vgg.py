"""Plain stacks of 3 × 3 convolutions."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bn_lightning.errors import BatchNormError, nearest
from bn_lightning.networks.layer_builder import LayerBuilder

__all__ = ["VGG"]

#: The channels of each convolution, by stages; columns A and D of the paper, and one for small images.
_LAYOUTS = {
    "small": ((16, 16), (32, 32), (64, 64)),
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class VGG(nn.Module):
    """Classify images by stages of 3 × 3 convolutions, each stage ending in a 2 × 2 maximum.

    What is left of the image is averaged, so that any size will do that is at least 2^stages pixels wide and high (the
    paper's takes 224 × 224); then come hidden fully connected layers, if there are any, and a linear head.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        layout: ``small, vgg11, vgg16``, or the channels of each convolution, one list a stage.
        hidden_widths: Features of the hidden fully connected layers; the paper has (4096, 4096), versions for CIFAR-10
            few or none.
        norm, norm_options, norm_place, affine, activation, init: See `LayerBuilder`.
        dropout: Probability, behind each hidden fully connected layer; before the head if there is none.

    Shape:
        Input (N, in_channels, H, W), output (N, num_classes).

    Raises:
        BatchNormError: As `LayerBuilder`, and for an unknown layout.

    Example:
        >>> import torch
        >>> VGG(layout=((8,), (16, 16)), norm_place="after", activation="elu")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Reference:
        Simonyan & Zisserman, arXiv:1409.1556, Table 1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        layout: str | Sequence[Sequence[int]] = "small",
        hidden_widths: Sequence[int] = (),
        norm: str | None = "batch",
        norm_options: Mapping[str, Any] | None = None,
        norm_place: str = "before",
        affine: bool | str = True,
        activation: str = "relu",
        dropout: float = 0.0,
        init: str = "he",
    ) -> None:
        super().__init__()
        build = LayerBuilder(
            norm=norm,
            norm_options=norm_options,
            norm_place=norm_place,
            affine=affine,
            activation=activation,
            dropout=dropout,
            init=init,
        )
        stages, channels = [], in_channels
        for widths in _stages_of(layout):
            sizes = [channels, *widths]
            stages.append(nn.Sequential(*map(build.conv_block, sizes[:-1], sizes[1:]), nn.MaxPool2d(2)))
            channels = sizes[-1]
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        sizes = [channels, *hidden_widths]
        self.hidden = nn.Sequential(*map(build.linear_block, sizes[:-1], sizes[1:]))
        self.dropout = nn.Identity() if hidden_widths else build.dropout()
        self.head = build.head(sizes[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, num_classes)."""
        features = self.pool(self.stages(images)).flatten(1)
        return self.head(self.dropout(self.hidden(features)))


def _stages_of(layout: str | Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    if not isinstance(layout, str):
        return layout
    if layout not in _LAYOUTS:
        raise BatchNormError(
            f"no layout is called {layout!r}{nearest(layout, _LAYOUTS)}; there are {', '.join(map(repr, _LAYOUTS))}, "
            "or give the channels of each convolution, one list a stage: [[16, 16], [32, 32]]."
        )
    return _LAYOUTS[layout]
