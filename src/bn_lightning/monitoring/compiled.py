"""Taps inside ``torch.compile``: one operator a tap, opaque to the compiler, so that no graph breaks.

A compiled graph is specialized on whether a watch samples, as on any attribute that it reads: between samples another
graph runs, without the operator and with every fusion.
"""

from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

__all__ = ["CompiledTap", "Measuring", "compiling", "record_in_graph"]


class Measuring(Protocol):
    """What takes the outputs in that compiled graphs hand over."""

    def measure_compiled(self, layer: str, output: Tensor) -> None:
        """Measure an output of the layer of that name."""


# The only thing an operator of this kind changes, or the compiler would drop it and might reorder two of them.
_TOKEN = torch.zeros(1, device="cpu")
_TAPS: WeakValueDictionary[int, "CompiledTap"] = WeakValueDictionary()

compiling: Callable[[], bool] = torch.compiler.is_compiling


class CompiledTap:
    """What an operator in a compiled graph finds its layer by.

    Its number is a tensor, an input of the graph: equal layers share one graph, which a constant would tell apart.
    """

    def __init__(self, watch: Measuring, layer: str) -> None:
        self._watch = ref(watch)
        self._layer = layer
        _TAPS[id(self)] = self
        self.key = torch.tensor(id(self), device="cpu")

    def __call__(self, output: Tensor) -> None:
        """Hand an output over to the watch, if there still is one."""
        watch = self._watch()
        if watch is not None:
            watch.measure_compiled(self._layer, output)


def record_in_graph(key: Tensor, output: Tensor) -> None:
    """Hand an output over when the graph that is being compiled runs."""
    _record(_TOKEN, output.detach(), key)


# Where graphs of CUDA kernels are recorded this one is left out: what Python does in it would be done once.
@torch.library.custom_op("bn_lightning::record_activation", mutates_args=("token",), tags=(torch.Tag.cudagraph_unsafe,))
def _record(token: Tensor, output: Tensor, key: Tensor) -> None:
    tap = _TAPS.get(int(key))
    if tap is not None:
        tap(output)


@_record.register_fake
def _(token: Tensor, output: Tensor, key: Tensor) -> None:
    return None
