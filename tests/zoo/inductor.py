"""What the freezing of torch's Inductor makes of the same network."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from zoo.architectures import Architecture
from zoo.crashes import told
from zoo.fx_fuse import is_functional_batch_norm
from zoo.outputs import outputs, relative_error
from zoo.rows import PeerRow
from zoo.subjects import norm_calls, prepare

__all__ = ["measure_inductor"]

# Its weights cannot be packed in float64, in which the output is compared; packing comes after folding.
_CONFIG = {"freezing": True, "cpp.weight_prepack": False, "freezing_discard_parameters": False}


@dataclass
class _Frozen:
    """A backend that runs Inductor up to the frozen graph, and that graph as it is instead of code made of it."""

    traced: int = 0
    left: int = 0
    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.traced += sum(map(is_functional_batch_norm, graph.graph.nodes))
        return compile_fx(graph, inputs, inner_compile=self._keep)

    def _keep(self, graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        self.left += _calls_left(graph)

        def run(arguments: list[Any]) -> Any:
            return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def measure_inductor(architecture: Architecture) -> PeerRow:
    """Freeze the network in float64 and count the BatchNorm calls of which something is still computed.

    Inductor takes batch norm apart into a subtraction, two multiplications and an addition, folds what it can into the
    weights, and marks every node with the operation and call it came from. A call counts as left if any arithmetic
    on activations is left of it in the frozen graph, or if it was in no graph at all.
    """
    name, calls, start = architecture.name, 0, time.perf_counter()
    try:
        subject = prepare(architecture)
        images = subject.examples.double()
        calls = norm_calls(subject.model, subject.examples).total()
        model = subject.model.double()
        exact = outputs(model, images)
        backend = _Frozen()
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(_CONFIG):
            error = relative_error(outputs(torch.compile(model, backend=backend, dynamic=False), images), exact)
        left = backend.left + calls - backend.traced
        note = "" if len(backend.graphs) == 1 else f"{len(backend.graphs)} graphs"
        return PeerRow(name, calls, left, error, time.perf_counter() - start, note=note)
    except Exception as exception:
        return PeerRow(name, calls, seconds=time.perf_counter() - start, crash=told(exception))
    finally:
        torch._dynamo.reset()
        gc.collect()


def _calls_left(graph: fx.GraphModule) -> int:
    left = set()
    for node in graph.graph.nodes:
        # What is computed of constants alone was computed by freezing, and is a constant itself.
        if node.op == "call_function" and "batch_norm" in str(node.meta.get("original_aten")):
            source = node.meta.get("source_fn_stack")  # dynamo's name of the call
            left.add(source[-1][0] if source else node.name)
    return len(left)
