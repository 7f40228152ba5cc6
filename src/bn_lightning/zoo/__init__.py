"""Networks by name: timm's, torchvision's, and whatever a function or class that can be imported builds."""

from bn_lightning.zoo.build import find_callable, is_zoo_name, load_zoo_model
from bn_lightning.zoo.checkpoint import load_checkpoint, read_checkpoint
from bn_lightning.zoo.input_size import default_input_size

__all__ = [
    "default_input_size",
    "find_callable",
    "is_zoo_name",
    "load_checkpoint",
    "load_zoo_model",
    "read_checkpoint",
]
