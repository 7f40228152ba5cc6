"""A perceptron of any depth."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bn_lightning.networks.layer_builder import LayerBuilder

__all__ = ["MLP"]


class MLP(nn.Module):
    """Classify vectors, or images as vectors, by hidden layers and a linear head.

    Args:
        in_features: Values an example.
        num_classes: Number of logits.
        widths: Features of each hidden layer.
        norm, norm_options, norm_place, affine, activation, init: See `LayerBuilder`.
        dropout: Probability, behind each hidden layer.

    Shape:
        Input (N, *) with in_features values an example, output (N, num_classes).

    Raises:
        BatchNormError: As `LayerBuilder`.

    Example:
        >>> import torch
        >>> MLP(64, widths=(32, 32), norm="renorm", activation="sigmoid")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int = 64,
        num_classes: int = 10,
        widths: Sequence[int] = (64, 64),
        norm: str | None = "batch",
        norm_options: Mapping[str, Any] | None = None,
        norm_place: str = "before",
        affine: bool | str = True,
        activation: str = "relu",
        dropout: float = 0.0,
        init: str = "he",
    ) -> None:
        super().__init__()
        build = LayerBuilder(
            norm=norm,
            norm_options=norm_options,
            norm_place=norm_place,
            affine=affine,
            activation=activation,
            dropout=dropout,
            init=init,
        )
        sizes = [in_features, *widths]
        self.hidden = nn.Sequential(*map(build.linear_block, sizes[:-1], sizes[1:]))
        self.head = build.head(sizes[-1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, (N, num_classes)."""
        return self.head(self.hidden(inputs.flatten(1)))
