"""Networks by name: timm's, torchvision's, transformers', and whatever a function that can be imported builds."""

from bn_lightning.zoo.build import find_callable, is_zoo_name
from bn_lightning.zoo.checkpoint import load_checkpoint, read_checkpoint
from bn_lightning.zoo.input_size import default_input_size
from bn_lightning.zoo.listing import ZooListing, ZooRow, describe_zoo_model, list_zoo_models
from bn_lightning.zoo.load import load_zoo_model
from bn_lightning.zoo.load_report import LoadReport, Remark, WeightsWarning, warn_of
from bn_lightning.zoo.save import save_checkpoint

__all__ = [
    "LoadReport",
    "Remark",
    "WeightsWarning",
    "ZooListing",
    "ZooRow",
    "default_input_size",
    "describe_zoo_model",
    "find_callable",
    "is_zoo_name",
    "list_zoo_models",
    "load_checkpoint",
    "load_zoo_model",
    "read_checkpoint",
    "save_checkpoint",
    "warn_of",
]
