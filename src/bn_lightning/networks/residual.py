"""A small residual network with BatchNorm after every convolution."""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["ResidualNetwork"]


class ResidualNetwork(nn.Module):
    """Classify images with stages of post-activation residual blocks.

    Each stage has ``blocks`` blocks of conv-BN-ReLU-conv-BN plus a skip, and every stage after the first halves the
    resolution. Convolutions before a BN have no bias, since β does its work.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        widths: Channels of each stage.
        blocks: Residual blocks a stage.

    Shape:
        Input (N, in_channels, H, W), output (N, num_classes).

    Example:
        >>> import torch
        >>> ResidualNetwork(widths=(8, 16), blocks=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Reference:
        He, Zhang, Ren & Sun, arXiv:1512.03385, §3.3 and Fig. 5 (left).
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(in_channels, widths[0]), nn.ReLU(inplace=True))
        stages, channels = [], widths[0]
        for index, width in enumerate(widths):
            stride = 1 if index == 0 else 2
            stage = [
                _Block(channels if block == 0 else width, width, stride if block == 0 else 1) for block in range(blocks)
            ]
            stages.append(nn.Sequential(*stage))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, num_classes)."""
        return self.head(self.pool(self.stages(self.stem(images))).flatten(1))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(in_channels, out_channels, stride)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv_bn(out_channels, out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Sequential(*_conv_bn(in_channels, out_channels, stride, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.skip(x))


def _conv_bn(in_channels: int, out_channels: int, stride: int = 1, kernel: int = 3) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(out_channels)
