"""Re-estimate the running statistics of a network from data, and write its weights with them."""

import json as json_module
from typing import Any

import torch

from bn_lightning.cli.data import open_batches
from bn_lightning.cli.network import importable_here, name_patterns, open_network
from bn_lightning.recalibration import recalibrate_batch_norm
from bn_lightning.zoo import find_callable, save_checkpoint

__all__ = ["recalibrate"]


def recalibrate(
    model: str,
    data: str,
    checkpoint: str | None = None,
    output: str | None = None,
    data_options: dict[str, Any] | None = None,
    batches: int = 200,
    forward: str | None = None,
    include: list[str] | str = "",
    exclude: list[str] | str = "",
    pretrained: bool = False,
    num_classes: int | None = None,
    json: bool = False,
) -> None:
    """Put population statistics into the running statistics, show what changed, and write the weights.

    Args:
        model: timm:NAME, torchvision:NAME, package.module:callable, or package.module:LightningModuleClass with its
            Lightning checkpoint; modules of the working folder can be named too. For example:
            bn-lightning recalibrate my.models:Net my.data:Data --checkpoint last.ckpt --output better.ckpt
        data: package.module:LightningDataModuleClass, or a function that gives training batches.
        checkpoint: File of weights, or a Lightning checkpoint; read with weights_only=True.
        output: Write the weights to this file, in the form of the checkpoint: a Lightning checkpoint stays one. Left
            out, nothing is written.
        data_options: Arguments of the data, as a JSON object; a data module's own come from the checkpoint where it has
            them.
        batches: Use at most so many batches; it stops earlier once every layer is known to 1 % of σ.
        forward: package.module:function of (model, batch) that runs the network, where its first argument is not the
            first element of a batch.
        include: Name patterns, with commas between, of the layers to recalibrate; all if left out.
        exclude: Name patterns, with commas between, of layers to leave out.
        pretrained: Load the zoo's own weights, which may download them.
        num_classes: Of the classifier, where it is not the network's default.
        json: Print one JSON object and nothing else.
    """
    torch.manual_seed(0)  # a loader that shuffles gives the same batches each time
    with importable_here(model, data, forward):
        network = open_network(model, checkpoint=checkpoint, pretrained=pretrained, num_classes=num_classes)
        train, _ = open_batches(data, data_options, checkpoint=checkpoint, network=network)
        result = recalibrate_batch_norm(
            network,
            train,
            max_batches=batches,
            forward=None if forward is None else find_callable(forward),
            include=name_patterns(include),
            exclude=name_patterns(exclude),
            show_progress=not json,
        )
    if output is not None:
        save_checkpoint(network, output, like=checkpoint)
    if json:
        print(json_module.dumps({"model": model, **result.to_dict(), "output": output}, indent=2))
        return
    result.table().print()
    print(f"written to {output}" if output else "nothing was written: --output names a file for the weights")
