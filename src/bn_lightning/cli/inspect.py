"""Show each BatchNorm layer of a network: its place, what feeds and reads it, whether it folds, its state."""

import json as json_module

from bn_lightning.cli.network import importable_here, inputs_for, name_patterns, open_network
from bn_lightning.folding import inspect_batch_norm

__all__ = ["inspect"]


def inspect(
    model: str,
    checkpoint: str | None = None,
    input_size: str | None = None,
    include: list[str] | str = "",
    exclude: list[str] | str = "",
    pretrained: bool = False,
    num_classes: int | None = None,
    json: bool = False,
) -> None:
    """Show each BatchNorm layer: its place, what feeds it, what reads it, whether it folds, its state.

    Args:
        model: timm:NAME, torchvision:NAME, package.module:callable, or package.module:LightningModuleClass with its
            Lightning checkpoint; modules of the working folder can be named too. For example:
            bn-lightning inspect timm:mobilenetv3_small_050
        checkpoint: File of weights, or a Lightning checkpoint; read with weights_only=True.
        input_size: Of one example, such as 3,224,224, where the network does not say it itself.
        include: Name patterns, with commas between, of the layers to show; all if left out.
        exclude: Name patterns, with commas between, of layers to leave out.
        pretrained: Load the zoo's own weights, which may download them.
        num_classes: Of the classifier, where it is not the network's default.
        json: Print one JSON object and nothing else.
    """
    with importable_here(model):
        network = open_network(model, checkpoint=checkpoint, pretrained=pretrained, num_classes=num_classes)
        found = inspect_batch_norm(
            network, inputs_for(network, input_size), name_patterns(include), name_patterns(exclude)
        )
    if json:
        print(json_module.dumps({"model": model, **found.to_dict()}, indent=2))
    else:
        found.table().print()
