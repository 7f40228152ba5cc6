"""Build a network from its name, with its weights, and say what is odd about them."""

from pathlib import Path

from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.zoo.build import build_by_name
from bn_lightning.zoo.checkpoint import load_checkpoint
from bn_lightning.zoo.load_report import warn_of
from bn_lightning.zoo.remarks import momentum_remarks, statistics_remarks

__all__ = ["load_zoo_model"]


def load_zoo_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Build a network by name, and load its weights from a file if one is given.

    What people trip over is warned of, as `WeightsWarning`: BatchNorm statistics that are not in the file or are those
    of a new layer, an ``eps`` other than that of the network the weights are from (where the file says which), and a
    ``momentum`` in Keras' convention. `load_checkpoint` returns the same as values.

    Args:
        name: ``timm:resnet50`` (timm's own names, tags included), ``torchvision:resnet50``, ``hf:resnet`` (a model
            type, a class of transformers, a folder with a ``config.json``, or a name on Hugging Face's hub), or
            ``package.module:callable``: a function or class that builds a network, or a network, which is taken as it
            is. Nothing is imported but what the name says.
        pretrained: Load the zoo's own weights, by its own means, which may need a network; of ``hf:FOLDER`` those in
            the folder.
        checkpoint: A file of weights, see `load_checkpoint`.
        num_classes: Of the classifier; the network's own default if ``None``. A callable gets it as ``num_classes=``.

    Returns:
        The network as its source builds it, in training mode.

    Raises:
        BatchNormError: If the name, the weights or the number of classes do not fit, or the package is not there.

    Example:
        >>> load_zoo_model("torch.nn:Identity")
        Identity()
    """
    if pretrained and checkpoint is not None:
        raise BatchNormError(f"{name!r} got its weights twice, from pretrained=True and from a checkpoint; give one.")
    model = build_by_name(name, pretrained=pretrained, num_classes=num_classes)
    if checkpoint is not None:
        warn_of(repr(name), load_checkpoint(model, checkpoint).remarks)
    else:
        warn_of(repr(name), [*(statistics_remarks(model) if pretrained else ()), *momentum_remarks(model)])
    return model
