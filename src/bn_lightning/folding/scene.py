"""A model, its recorded forward pass, and what is known of its normalization layers and of its memory."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from bn_lightning.folding.norms import Norm, inspect_norm, named_norms
from bn_lightning.folding.numbers import Numbers, owned_tensor
from bn_lightning.folding.reasons import Kept
from bn_lightning.internals import hooks_on
from bn_lightning.preservation import in_float64, on_device, preserved
from bn_lightning.tracing.channels import Bypass
from bn_lightning.tracing.record import ForwardRecord, Operation

__all__ = ["Scene"]


class Scene:
    """What the decisions on single layers look at.

    Attributes:
        model: The network.
        record: Its recorded forward pass.
        norms: The normalization layers that are understood.
        kept: Why the others stay.
        gone: Names of those that are folded already, and are looked through.
    """

    def __init__(self, model: nn.Module, record: ForwardRecord) -> None:
        self.model = model
        self.record = record
        self.norms: dict[str, Norm] = {}
        self.kept: dict[str, Kept] = {}
        self.gone: set[str] = set()
        self._spans = [
            (name, tensor, *_span(tensor))
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.numel() and tensor.layout == torch.strided
        ]
        hooked = {name: hooks_on(module) for name, module in model.named_modules() if hooks_on(module)}
        self._hooked = [(call, hooked[call.module][0]) for call in record.module_calls if call.module in hooked]
        for name, module in named_norms(model).items():
            found = inspect_norm(self, name, module)
            if isinstance(found, Norm):
                self.norms[name] = found
            else:
                self.kept[name] = found
        self._makers = {call.output: norm for norm in self.norms.values() for call in norm.calls}
        self._readers = {
            (call.input, index): norm
            for norm in self.norms.values()
            for call in norm.calls
            for index in call.operations
        }

    def bypasses(self) -> list[Bypass]:
        """Return the calls of layers that are folded already."""
        return [call for name in self.gone for call in self.norms[name].calls]

    def normalized(self) -> set[int]:
        """Return the values that layers which are still there make."""
        return {value for value, norm in self._makers.items() if norm.name not in self.gone}

    def norm_that_made(self, value: int) -> Norm | None:
        """Return the layer whose normalized output a value is."""
        return self._makers.get(value)

    def norm_that_reads(self, operation: Operation, value: int) -> Norm | None:
        """Return the layer that an operation on its input belongs to."""
        return self._readers.get((value, operation.index))

    def seen_outside(self, index: int) -> Kept | None:
        """Say how a value is seen otherwise than by recorded operations, if it is."""
        value, producer = self.record.values[index], self.record.producer(index)
        if value.output:
            return Kept("output", f"the model returns the output of {producer}")
        if value.escaped:
            return Kept("escaped", f"the output of {producer} is kept somewhere after the forward pass")
        if value.unseen:
            unseen = value.unseen[0]
            return Kept("opaque", f"the output of {producer} is read by {unseen} in code that cannot be recorded")
        return None

    def hook_on(self, values: Collection[int]) -> Kept | None:
        """Find a hook that is handed one of some values."""
        for call, kind in self._hooked:
            if any(index in values for index in (*call.inputs, *call.outputs)):
                return Kept("hook", f"{call.module or 'the root module'!r} carries {kind}")
        return None

    def sharing_memory(self, name: str) -> list[str]:
        """Name the other parameters and buffers that lie in the same memory."""
        tensor = owned_tensor(self.model, name)
        if tensor is None:
            return []
        first, last = _span(tensor)
        return [
            other
            for other, candidate, start, end in self._spans
            if start <= last and first <= end and candidate is not tensor and candidate.device == tensor.device
        ]

    def behaves_like(self, norm: Norm, module: nn.Module) -> bool:
        """Put a layer that computes by itself to the test, in float64 on the CPU."""
        scale, shift = Numbers(self.model).affine(norm)
        dims = {len(self.record.values[call.input].shape) for call in norm.calls}
        with preserved(module), on_device(module, torch.device("cpu")), in_float64(module), torch.no_grad():
            return all(_is_affine(module, scale.cpu(), shift.cpu(), shape) for shape in _shapes(len(scale), dims))


def _shapes(channels: int, dims: Iterable[int]) -> list[tuple[int, ...]]:
    return [(batch, channels, *[3] * (each - 2)) for each in dims for batch in (1, 4)]


def _is_affine(module: nn.Module, scale: Tensor, shift: Tensor, shape: tuple[int, ...]) -> bool:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return all(_is_affine_of(module, scale, shift, x * size) for size in (1e-3, 1.0, 1e6))


def _is_affine_of(module: nn.Module, scale: Tensor, shift: Tensor, x: Tensor) -> bool:
    per_channel = (-1, *[1] * (x.dim() - 2))
    try:
        found = module(x)
    except Exception:
        return False
    expected = scale.view(per_channel) * x + shift.view(per_channel)
    return bool(torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first and last byte of a tensor's memory."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + max(extent, 0) * tensor.element_size()
