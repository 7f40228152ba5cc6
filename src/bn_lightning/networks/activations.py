"""Activations by name, for so many channels."""

from collections.abc import Callable

from torch import Tensor, nn

from bn_lightning.errors import BatchNormError, nearest

__all__ = ["ACTIVATIONS", "Maxout", "build_activation"]


class Maxout(nn.Module):
    """Take the largest of each channel's ``pieces``, which stand beside each other.

    Args:
        pieces: Values a channel; the layer before has so many times the channels.

    Shape:
        Input (N, C · pieces, *), output (N, C, *).

    Example:
        >>> import torch
        >>> Maxout(2)(torch.tensor([[1.0, 5.0, 4.0, 2.0]]))
        tensor([[5., 4.]])

    Reference:
        Goodfellow, Warde-Farley, Mirza, Courville & Bengio, Maxout Networks, arXiv:1302.4389, §3.
    """

    def __init__(self, pieces: int = 2) -> None:
        super().__init__()
        self.pieces = pieces

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, C, *)."""
        return input.unflatten(1, (-1, self.pieces)).amax(2)

    def extra_repr(self) -> str:
        """Show the pieces."""
        return f"pieces={self.pieces}"


#: Name to what builds it for a number of channels.
ACTIVATIONS: dict[str, Callable[[int, bool], nn.Module]] = {
    "relu": lambda channels, inplace: nn.ReLU(inplace=inplace),
    "rrelu": lambda channels, inplace: nn.RReLU(inplace=inplace),
    "prelu": lambda channels, inplace: nn.PReLU(channels),  # one slope a channel, as in He et al., arXiv:1502.01852
    "elu": lambda channels, inplace: nn.ELU(inplace=inplace),
    "maxout": lambda channels, inplace: Maxout(),
    "sigmoid": lambda channels, inplace: nn.Sigmoid(),
    "tanh": lambda channels, inplace: nn.Tanh(),
    "none": lambda channels, inplace: nn.Identity(),
}


def build_activation(name: str, channels: int, *, inplace: bool = True) -> nn.Module:
    """Build an activation.

    Args:
        name: ``relu, rrelu, prelu, elu, maxout, sigmoid, tanh`` or ``none``.
        channels: Of its output; a PReLU has a slope for each.
        inplace: Whether it may write over its input, where it can.

    Raises:
        BatchNormError: If there is no such activation; the message has the nearest name and all of them.

    Example:
        >>> build_activation("prelu", 3)
        PReLU(num_parameters=3)
    """
    if name not in ACTIVATIONS:
        there = ", ".join(map(repr, ACTIVATIONS))
        raise BatchNormError(f"no activation is called {name!r}{nearest(str(name), ACTIVATIONS)}; there are {there}.")
    return ACTIVATIONS[name](channels, inplace)
