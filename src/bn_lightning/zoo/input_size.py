"""What size of input a network was made for."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["default_input_size"]

# Their networks take clips and pairs of images.
_NOT_IMAGES = ("torchvision.models.video.", "torchvision.models.optical_flow.")


def default_input_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return the size of one example, without the batch axis, of the zoos' image networks.

    Returns:
        timm's ``default_cfg["input_size"]``; (3, 224, 224) for torchvision's; the ``num_channels`` and ``image_size``
        of a transformers configuration, 3 and 224 where it has none; ``None`` if the network does not say.

    Example:
        >>> default_input_size(nn.Linear(2, 1)) is None
        True
    """
    configuration = getattr(model, "default_cfg", None)
    if isinstance(configuration, Mapping) and configuration.get("input_size"):
        return tuple(configuration["input_size"])
    home = f"{type(model).__module__}."
    if home.startswith("torchvision.models.") and not home.startswith(_NOT_IMAGES):
        return (3, 224, 224)
    if home.startswith("transformers.") and getattr(model, "main_input_name", None) == "pixel_values":
        return _of_transformers(model.config)
    return None


def _of_transformers(config: Any) -> tuple[int, ...]:
    config = getattr(config, "vision_config", config)  # CLIP's and its like
    size, channels = getattr(config, "image_size", None) or 224, getattr(config, "num_channels", None) or 3
    height, width = (size, size) if isinstance(size, int) else size
    return (channels, height, width)
