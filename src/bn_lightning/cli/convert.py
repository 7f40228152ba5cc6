"""Turn a network's BatchNorm layers into another normalization, show what became of each, and write its weights."""

import json as json_module
from typing import Any

from bn_lightning.cli.network import importable_here, name_patterns, open_network
from bn_lightning.layers import convert_batch_norm
from bn_lightning.zoo import find_callable, save_checkpoint

__all__ = ["convert"]


def convert(
    model: str,
    to: str,
    options: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    output: str | None = None,
    include: list[str] | str = "",
    exclude: list[str] | str = "",
    pretrained: bool = False,
    num_classes: int | None = None,
    json: bool = False,
) -> None:
    """Turn the BatchNorm layers of a network into another normalization; tell of each whether it was, or why not.

    In code, bn_lightning.convert_batch_norm does the same to the network in hand, and ConvertBatchNorm under a Trainer.

    Args:
        model: timm:NAME, torchvision:NAME, package.module:callable, or package.module:LightningModuleClass with its
            Lightning checkpoint; modules of the working folder can be named too. For example:
            bn-lightning convert timm:resnet18 ghost --options '{"virtual_batch_size": 16}' --include 'layer4.*'
        to: frozen, ghost, renorm, debiased, cross_replica, masked, lp, noisy, adaptive, domain or group, or
            package.module:Class.
        options: The variant's settings, as a JSON object.
        checkpoint: File of weights, or a Lightning checkpoint; read with weights_only=True.
        output: Write the weights of the converted network to this file, in the form of the checkpoint. Those of a
            variant fit the plain network too; of group and domain they do not.
        include: Name patterns, with commas between, of the layers to convert; all if left out.
        exclude: Name patterns, with commas between, of layers to leave out.
        pretrained: Load the zoo's own weights, which may download them.
        num_classes: Of the classifier, where it is not the network's default.
        json: Print one JSON object and nothing else.
    """
    with importable_here(model, to if ":" in to else None):
        network = open_network(model, checkpoint=checkpoint, pretrained=pretrained, num_classes=num_classes)
        report = convert_batch_norm(
            network,
            find_callable(to) if ":" in to else to,
            name_patterns(include),
            name_patterns(exclude),
            **(options or {}),
        )
    if output is not None:
        save_checkpoint(network, output, like=checkpoint)
    if json:
        print(json_module.dumps({"model": model, **report.to_dict(), "output": output}, indent=2))
        return
    report.table().print()
    if output is not None:
        print(f"written to {output}")
