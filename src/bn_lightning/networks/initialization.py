"""Initial weights by name."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bn_lightning.errors import BatchNormError, nearest

__all__ = ["INITIALIZATIONS", "initialize_", "require_initialization"]

#: Name to what fills a weight (outputs, inputs, *) in place.
INITIALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "he_fan_out": partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "glorot": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


def require_initialization(init: str) -> None:
    """Refuse a name that initializes nothing by itself.

    Raises:
        BatchNormError: If there is no such initialization, or it needs data.
    """
    if init == "lsuv":
        raise BatchNormError(
            "init='lsuv' needs data, of which there is none yet: build the network with init='orthogonal', then call "
            "bn_lightning.networks.lsuv_(network, images) on a batch."
        )
    if init not in INITIALIZATIONS:
        there = ", ".join(map(repr, INITIALIZATIONS))
        raise BatchNormError(
            f"no initialization is called {init!r}{nearest(str(init), INITIALIZATIONS)}; there are {there}, and "
            "lsuv_(network, images) for a network that is built."
        )


def initialize_(layer: nn.Linear | _ConvNd, init: str) -> None:
    """Draw a layer's weight anew, in place, and set its bias to zero.

    Args:
        layer: A linear layer or a convolution; n_in and n_out count what one output reads and one input is read by.
        init: ``he``: normal, variance 2 / n_in, which keeps the scale of activations through ReLUs. ``he_fan_out``:
            variance 2 / n_out, which keeps that of gradients. ``glorot``: uniform, variance 2 / (n_in + n_out).
            ``orthogonal``: the weight as a matrix (outputs, n_in) has orthonormal rows or, if it is tall, columns.

    Raises:
        BatchNormError: See `require_initialization`.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> initialize_(layer, "orthogonal")
        >>> bool((layer.weight @ layer.weight.T).diagonal().allclose(layer.weight.new_ones(2)))
        True

    Reference:
        He et al., arXiv:1502.01852, eq. 10 and 14; Glorot & Bengio, AISTATS 2010, eq. 12 and 16; Saxe, McClelland &
        Ganguli, arXiv:1312.6120, §3.
    """
    require_initialization(init)
    INITIALIZATIONS[init](layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
