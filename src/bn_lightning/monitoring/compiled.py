"""Taps inside ``torch.compile``: one operator a tap, opaque to the compiler, so that no graph breaks.

A compiled graph is specialized on whether a watch samples, as on any attribute that it reads: between samples another
graph runs, without the operator and with every fusion.
"""

from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["Measuring", "compiling", "record_in_graph", "register_watch"]


class Measuring(Protocol):
    """What takes the outputs in that compiled graphs hand over."""

    def measure_compiled(self, layer: str, output: Tensor) -> None:
        """Measure an output of the layer of that name."""


_WATCHES: WeakValueDictionary[int, Measuring] = WeakValueDictionary()
# The only thing an operator of this kind changes, or the compiler would drop it and might reorder two of them.
_TOKEN = torch.zeros(1, device="cpu")

compiling: Callable[[], bool] = torch.compiler.is_compiling


def register_watch(watch: Measuring) -> int:
    """Return the number under which compiled graphs know a watch, for as long as it lives."""
    number = id(watch)
    _WATCHES[number] = watch
    return number


def record_in_graph(watch: int, layer: str, output: Tensor) -> None:
    """Hand an output over when the graph that is being compiled runs."""
    _record(_TOKEN, output.detach(), watch, layer)


# Where graphs of CUDA kernels are recorded this one is left out: what Python does in it would be done once.
@torch.library.custom_op("bn_lightning::record_activation", mutates_args=("token",), tags=(torch.Tag.cudagraph_unsafe,))
def _record(token: Tensor, output: Tensor, watch: int, layer: str) -> None:
    watching = _WATCHES.get(watch)
    if watching is not None:
        watching.measure_compiled(layer, output)


@_record.register_fake
def _(token: Tensor, output: Tensor, watch: int, layer: str) -> None:
    return None
