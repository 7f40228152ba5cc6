"""A product of matrices, with or without normalization in between."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.networks.layer_builder import LayerBuilder

__all__ = ["DeepLinearNetwork"]


class DeepLinearNetwork(nn.Module):
    """Multiply by W₁, W₂, …, W_depth, without biases and activations; with a norm behind each but the last.

    With the defaults and ``norm=None`` it is the network of Santurkar et al.'s experiment: 25 matrices of 10 × 10.
    (Where their normalized one has its norms, the paper does not say.)

    Args:
        in_features: Values an example.
        num_classes: Values of the output: logits, or regression targets.
        width: Values between two layers.
        depth: Number of matrices, the last one included.
        norm, norm_options, affine, init: See `LayerBuilder`.

    Shape:
        Input (N, *) with in_features values an example, output (N, num_classes).

    Raises:
        BatchNormError: As `LayerBuilder`.

    Example:
        >>> network = DeepLinearNetwork(norm=None)
        >>> x = torch.randn(4, 10)
        >>> bool(torch.allclose(network(x), x @ network.product().T, atol=1e-5))
        True

    Reference:
        Santurkar, Tsipras, Ilyas & Mądry, arXiv:1805.11604, §2.2 and appendix A.
    """

    def __init__(
        self,
        in_features: int = 10,
        num_classes: int = 10,
        width: int = 10,
        depth: int = 25,
        norm: str | None = "batch",
        norm_options: Mapping[str, Any] | None = None,
        affine: bool | str = True,
        init: str = "glorot",
    ) -> None:
        super().__init__()
        build = LayerBuilder(
            norm=norm, norm_options=norm_options, affine=affine, activation="none", init=init, bias=False
        )
        sizes = [in_features, *[width] * (depth - 1)]
        self.hidden = nn.Sequential(*map(build.linear_block, sizes[:-1], sizes[1:]))
        self.head = build.head(sizes[-1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product, (N, num_classes)."""
        return self.head(self.hidden(inputs.flatten(1)))

    def product(self) -> Tensor:
        """Return W_depth ⋯ W₂ W₁, (num_classes, in_features): all that the network does if there is no norm."""
        weights = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]
        return torch.linalg.multi_dot(weights[::-1]) if len(weights) > 1 else weights[0]
