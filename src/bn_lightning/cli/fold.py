"""Fold a network's BatchNorm layers, show what became of each, and write the folded network."""

import json as json_module
from typing import Literal

from bn_lightning.cli.network import importable_here, inputs_for, name_patterns, open_network
from bn_lightning.folding import FoldReport, fold_batch_norm
from bn_lightning.folding.ship import require_format, ship_network

__all__ = ["fold"]


def fold(
    model: str,
    checkpoint: str | None = None,
    output: str | None = None,
    input_size: str | None = None,
    standalone: Literal["keep", "affine"] = "keep",
    include: list[str] | str = "",
    exclude: list[str] | str = "",
    pretrained: bool = False,
    num_classes: int | None = None,
    json: bool = False,
) -> None:
    """Fold the BatchNorm layers of a network into its weights, verify it, show and write the result.

    Args:
        model: timm:NAME, torchvision:NAME, package.module:callable (a function or class that builds the network, also
            of the working folder), or package.module:LightningModuleClass with its Lightning checkpoint. For example:
            bn-lightning fold timm:resnet50 --checkpoint weights.pth --output resnet50.onnx
        checkpoint: File of weights (a state_dict, or one under "state_dict" or "model"), or a Lightning checkpoint;
            read with weights_only=True.
        output: Write the folded network, by the file's ending. .pt or .pth is the whole network by torch.save, loaded
            by torch.load(…, weights_only=False) where the packages of its classes are installed (not bn-lightning,
            unless --standalone affine left layers of it); .pt2 is a torch.export program for any batch size, loaded by
            torch.export.load(…).module(); .onnx is ONNX for any batch size. Missing folders are made; a file that is
            there is replaced once the new one is complete.
        input_size: Of one example, such as 3,224,224; four or five numbers begin with the batch size, otherwise 2. Left
            out, it is timm's own, 3,224,224 for torchvision, and a LightningModule's example_input_array.
        standalone: What becomes of a layer that cannot be folded: it stays, or a scale and a shift take its place.
        include: Name patterns, with commas between, of the layers to fold, such as "layer1.*,*.bn2"; all if left out.
        exclude: Name patterns, with commas between, of layers to leave alone.
        pretrained: Load the zoo's own weights, which may download them.
        num_classes: Of the classifier, where it is not the network's default.
        json: Print one JSON object and nothing else.
    """
    if output is not None:
        require_format(output)
    with importable_here(model):
        network = open_network(model, checkpoint=checkpoint, pretrained=pretrained, num_classes=num_classes)
        inputs = inputs_for(network, input_size)
        result = fold_batch_norm(
            network, inputs, include=name_patterns(include), exclude=name_patterns(exclude), standalone=standalone
        )
        if not json:
            print(result.report, flush=True)
            if _folded(result.report) == 0:
                print("No BatchNorm layer was folded; the table says why each stays.", flush=True)
        shipped = None if output is None else ship_network(result.model, inputs, output)
    if json:
        written = None if shipped is None else shipped.to_dict()
        folded = {"model": model, "folded": _folded(result.report), **result.report.to_dict(), "output": written}
        print(json_module.dumps(folded, indent=2))
    elif shipped is not None:
        print(f"written to {shipped}")


def _folded(report: FoldReport) -> int:
    return sum(row.action not in ("kept", "affine") for row in report.rows)
