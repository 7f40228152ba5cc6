"""What ``torch.fx.experimental.optimization.fuse`` makes of the same network."""

import time

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from zoo.crashes import told
from zoo.outputs import outputs, relative_error
from zoo.rows import PeerRow

from bn_lightning.folding.norms import is_norm

__all__ = ["is_functional_batch_norm", "measure_fx"]


def measure_fx(name: str, calls: int, model: nn.Module, images: Tensor, exact: list[Tensor]) -> PeerRow:
    """Fuse the network, which cannot be used afterwards, and count the BatchNorm nodes of the graph.

    Those are calls of BatchNorm modules, and of the function for classes that fx traces through.
    """
    start = time.perf_counter()
    try:
        fused = fuse(model, inplace=True)  # without a copy, so that the largest fit into memory
        modules = dict(fused.named_modules())
        left = sum(
            (node.op == "call_module" and is_norm(modules[node.target])) or is_functional_batch_norm(node)
            for node in fused.graph.nodes
        )
        error = relative_error(outputs(fused, images), exact)
    except Exception as exception:
        return PeerRow(name, calls, seconds=time.perf_counter() - start, crash=told(exception))
    return PeerRow(name, calls, left, error, time.perf_counter() - start)


def is_functional_batch_norm(node: fx.Node) -> bool:
    """Whether a node calls batch norm as a function, with running statistics."""
    if node.target is nn.functional.batch_norm:
        return (node.args[1] if len(node.args) > 1 else node.kwargs.get("running_mean")) is not None
    return node.target is torch.batch_norm and node.args[3] is not None
