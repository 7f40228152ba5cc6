"""A network with the numbers and images that it is measured with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zoo.architectures import Architecture, build, seed_of
from zoo.crashes import told
from zoo.outputs import outputs, relative_error
from zoo.randomize import randomize

from bn_lightning import record_forward
from bn_lightning.folding.norms import named_norms

__all__ = ["Subject", "norm_calls", "prepare"]

_SIZES = (64, 96, 128, 224)
_IMAGES, _EXAMPLES = 8, 2
# Where float32 is this far off, float64 is by 1e-11 or more: an attention at a tie, say, where nothing can be compared.
_ILL_CONDITIONED = 1e-2
_DRAWS = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """What is folded and compared.

    Attributes:
        model: The network in float32, its BatchNorm randomized.
        images: Eight, on which it is well conditioned.
        plain: Its output in float32 for each of them alone.
        exact: The same in float64.
    """

    model: nn.Module
    images: Tensor
    plain: Sequence[Sequence[Tensor]]
    exact: Sequence[Sequence[Tensor]]

    @property
    def examples(self) -> Tensor:
        """The two images it is folded with."""
        return self.images[:_EXAMPLES]

    @property
    def singles(self) -> tuple[Tensor, ...]:
        """All images, one by one."""
        return self.images.split(1)


def prepare(architecture: Architecture) -> Subject:
    """Build the network, randomize it, and draw images of the smallest size that it takes.

    Raises:
        ValueError: If it takes none.
    """
    model = build(architecture.name)
    generator = torch.Generator().manual_seed(seed_of(architecture.name))
    images = _fitting(model, architecture, generator)
    randomize(model, images, generator)
    plain, exact = _in_both(model, images)
    for _ in range(_DRAWS):
        bad = [index for index in range(_IMAGES) if relative_error(plain[index], exact[index]) > _ILL_CONDITIONED]
        if not bad:
            break
        images[bad] = torch.randn(images[bad].shape, generator=generator)
        for index, *both in zip(bad, *_in_both(model, images[bad]), strict=True):
            plain[index], exact[index] = both
    return Subject(model, images, plain, exact)


def norm_calls(model: nn.Module, images: Tensor) -> Counter[str]:
    """Count the calls of each BatchNorm layer, and of functional batch norms outside any, in one forward pass.

    A functional one without statistics is none: so weights are standardized.
    """
    record, norms = record_forward(model, images), named_norms(model)
    calls = Counter(call.module for call in record.module_calls if call.module in norms)
    for operation in record.of_kind("batch_norm"):
        assert operation.layer is not None
        if operation.module not in norms and operation.layer.tensors.get("running_mean") is not None:
            owners = operation.layer.owners("running_mean")
            calls[owners[0] if owners else f"{operation.module or '(root)'}: batch_norm"] += 1
    return calls


def _fitting(model: nn.Module, architecture: Architecture, generator: torch.Generator) -> Tensor:
    channels, *own = architecture.input_size or (3,)
    sizes = [] if architecture.fixed else [[size, size] for size in _SIZES]
    sizes += [own] if own else []
    problem = "none was tried"
    for size in sizes:
        images = torch.randn(_IMAGES, channels, *size, generator=generator)
        try:
            made = outputs(model, images[:_EXAMPLES])
        except Exception as exception:
            problem = told(exception)
            continue
        if made and all(tensor.numel() for tensor in made):
            return images
        problem = "it returned nothing"
    raise ValueError(f"{architecture.name} takes images of none of the sizes {sizes}: {problem}")


def _in_both(model: nn.Module, images: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    plain = [outputs(model, image) for image in images.split(1)]
    model.double()
    exact = [outputs(model, image) for image in images.double().split(1)]
    model.float()  # bit for bit what it was
    return plain, exact
