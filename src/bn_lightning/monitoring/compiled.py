"""Taps inside ``torch.compile``: one operator a tap, opaque to the compiler, so that no graph breaks.

A compiled graph is specialized on whether a watch samples, as on any attribute that it reads: between samples another
graph runs, without the operator and with every fusion.
"""

from collections.abc import Callable
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["CompiledTap", "compiling", "record_in_graph"]


# The only thing an operator of this kind changes, or the compiler would drop it and might reorder two of them.
_TOKEN = torch.zeros(1, device="cpu")
_NUMBERS = count()
_TAPS: WeakValueDictionary[int, "CompiledTap"] = WeakValueDictionary()

compiling: Callable[[], bool] = torch.compiler.is_compiling


class CompiledTap:
    """What an operator in a compiled graph finds its layer by.

    Its number is a tensor, an input of the graph: equal layers share one graph, which a constant would tell apart.

    Args:
        receive: What takes the layer's outputs.
    """

    def __init__(self, receive: Callable[[Tensor], None]) -> None:
        number = next(_NUMBERS)
        _TAPS[number] = self
        self.receive = receive
        self.key = torch.tensor(number, device="cpu")


def record_in_graph(key: Tensor, output: Tensor) -> None:
    """Hand an output over when the graph that is being compiled runs."""
    _record(_TOKEN, output.detach(), key)


# Where graphs of CUDA kernels are recorded this one is left out: what Python does in it would be done once.
@torch.library.custom_op("bn_lightning::record_activation", mutates_args=("token",), tags=(torch.Tag.cudagraph_unsafe,))
def _record(token: Tensor, output: Tensor, key: Tensor) -> None:
    tap = _TAPS.get(int(key))
    if tap is not None:  # or the graph has outlived it
        tap.receive(output)


@_record.register_fake
def _(token: Tensor, output: Tensor, key: Tensor) -> None:
    return None
