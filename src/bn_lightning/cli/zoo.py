"""List the zoos' networks: which have BatchNorm, how many layers, which fold."""

import json as json_module
from typing import Literal

from bn_lightning.cli.network import name_patterns
from bn_lightning.errors import BatchNormError
from bn_lightning.zoo import list_zoo_models

__all__ = ["zoo"]


def zoo(pattern: list[str] | str, detail: Literal["names", "layers", "folds"] = "layers", json: bool = False) -> None:
    """List networks of timm, torchvision and transformers: which have BatchNorm, how many layers, which fold.

    Args:
        pattern: Name patterns with commas between, with the zoo or without. For example:
            bn-lightning zoo 'timm:resnet1*,torchvision:vgg*_bn' --detail folds
        detail: How much to find out of each. names builds nothing; layers builds each without data, a tenth of a second
            each; folds also records a forward pass of those with BatchNorm, seconds each.
        json: Print one JSON object and nothing else.
    """
    patterns = name_patterns(pattern)
    if not patterns:
        raise BatchNormError("zoo lists the networks whose names match a pattern; give one, such as 'timm:resnet*'.")
    listing = list_zoo_models(patterns, detail=detail)
    if json:
        print(json_module.dumps(listing.to_dict(), indent=2))
    else:
        listing.table().print()
