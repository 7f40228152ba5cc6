"""How far two networks agree on somebody's own data."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from bn_lightning.errors import FoldError
from bn_lightning.folding.verify import difference_and_size
from bn_lightning.tracing.nested import iter_tensors

__all__ = ["Agreement", "measure_agreement"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Folded against unfolded, in the network's own dtype.

    Attributes:
        examples: How many were compared.
        top1: Share of examples, or of positions, whose largest class is the same; ``None`` if the output has no classes
            along axis 1.
        largest_difference: Largest |Δ| of any floating-point output, in the output's units.
        largest_output: Largest |y| of the unfolded network, for comparison.
    """

    examples: int
    top1: float | None
    largest_difference: float
    largest_output: float

    def __str__(self) -> str:
        top1 = "" if self.top1 is None else f"top-1 agreement {self.top1:.2%}, "
        return (
            f"on your {self.examples} examples: {top1}largest difference {self.largest_difference:.1e} "
            f"(outputs up to {self.largest_output:.3g})"
        )


def measure_agreement(
    run: Callable[[Any], tuple[Any, Any]], batches: Iterable[Any], *, max_batches: int = 32
) -> Agreement:
    """Compare what two networks make of batches.

    Args:
        run: Gives both networks' outputs for the inputs of one batch.
        batches: Tensors, or tuples whose first element are the inputs; at most ``max_batches`` are taken.
        max_batches: So many.

    Raises:
        FoldError: If there are no batches, or the unfolded network's output for one is nan or infinite throughout.
    """
    examples, same, positions = 0, 0, 0
    difference = size = 0.0
    for batch in islice(batches, max_batches):
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(inputs, Tensor):
            raise FoldError(
                f"batches= takes tensors, or tuples whose first element is one; got a {type(inputs).__name__}. Give "
                "such inputs as example_inputs, which are compared too."
            )
        examples += len(inputs)
        before, after = (list(_floats(output)) for output in run(inputs))
        for ours, theirs in zip(before, after, strict=True):
            if not ours.numel():
                continue
            if not ours.isfinite().any():
                raise FoldError(
                    "the unfolded network's output on one of the batches= is nan or inf throughout: there is "
                    "nothing to compare. Leave that batch out."
                )
            apart, largest = difference_and_size(theirs, ours)
            difference, size = max(difference, apart), max(size, largest)
        if before and before[0].dim() > 1 and before[0].shape[1] > 1:
            equal = before[0].argmax(1) == after[0].argmax(1)
            same, positions = same + int(equal.sum()), positions + equal.numel()
    if not examples:
        raise FoldError("batches= gave no batch to compare.")
    return Agreement(examples, same / positions if positions else None, difference, size)


def _floats(output: Any) -> Iterator[Tensor]:
    return (tensor for tensor in iter_tensors(output) if tensor.is_floating_point())
