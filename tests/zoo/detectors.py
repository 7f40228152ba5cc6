"""Detection models of torchvision up to the tensors that post-processing starts from."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BareDetector"]

_REGION_HEADS = ("box", "mask", "keypoint")


class BareDetector(nn.Module):
    """Return features, box and class tensors of a detector, before boxes are picked among them.

    Where the network picks few boxes or none, comparing these would prove nothing. The R-CNNs' region heads are given
    the largest feature map, averaged to the size of a region.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        features = list(self.detector.backbone(images).values())
        if hasattr(self.detector, "head"):  # RetinaNet, FCOS, SSD
            return features, self.detector.head(features)
        return features, self.detector.rpn.head(features), *self._regions(features)

    def _regions(self, features: list[Tensor]) -> Iterator[Any]:
        heads = self.detector.roi_heads
        for kind in _REGION_HEADS:
            pool, head = getattr(heads, f"{kind}_roi_pool"), getattr(heads, f"{kind}_head")
            if head is not None:
                regions = F.adaptive_avg_pool2d(features[0], pool.output_size)
                yield getattr(heads, f"{kind}_predictor")(head(regions))
