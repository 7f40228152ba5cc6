"""Watch folded pairs at work: what a folded layer gives is for the layer that was folded into it, and nobody else."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import FoldError
from bn_lightning.folding.report import FoldPair
from bn_lightning.folding.surgery import Surgery
from bn_lightning.internals import is_compiled
from bn_lightning.tracing.layers import function_name, reads_metadata
from bn_lightning.tracing.nested import iter_tensors

__all__ = ["FoldGuard"]

# With dropout in evaluation, a tensor contiguous already, of that dtype already, these return their very input.
# fmt: off
_PASSING = frozenset(
    {
        "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "contiguous", "to",
        "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "pos", "positive", "resolve_conj",
        "resolve_neg",
    }
)
# fmt: on


class FoldGuard:
    """Hooks that refuse a use of a folded pair which the example inputs did not show.

    A fold was verified on what the example calls reach. Code that calls the folded layer on its own, or gives the
    BatchNorm layer something else, would silently get other numbers; here it gets a `FoldError` at that very line.
    The values themselves are passed on untouched, and nothing waits for a device.

    Attributes:
        unwatched: For each BatchNorm layer that cannot be watched, why.

    Example:
        >>> from bn_lightning import fold_batch_norm
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        >>> guard = fold_batch_norm(net, torch.randn(4, 3)).guarded()
        >>> net(torch.ones(1, 3)).shape
        torch.Size([1, 2])
        >>> net[0](torch.ones(1, 3)).mean()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        bn_lightning.errors.FoldError: the output of '0' is read by mean, but '1' is folded into '0'...
        >>> guard.close()
    """

    def __init__(self, surgery: Surgery) -> None:
        model, self._surgery = surgery.model, surgery
        compiled = {id(child) for module in model.modules() if is_compiled(module) for child in module.modules()}
        self.unwatched: dict[str, str] = {}
        # Each value handed out and not yet taken in: as it was handed out, and as it was.
        self._given: dict[FoldPair, list[tuple[Any, Tensor]]] = {}
        self._handles = []
        for pair in surgery.pairs:
            producer, identity = model.get_submodule(pair.producer), model.get_submodule(pair.batch_norm)
            if not pair.called:
                self.unwatched[pair.batch_norm] = f"{_called(pair.producer)} does more than that layer"
            elif id(producer) in compiled or id(identity) in compiled:
                self.unwatched[pair.batch_norm] = "torch.compile runs it"
            else:
                self._given[pair] = []
                self._handles += [
                    producer.register_forward_hook(partial(self._hand_out, pair)),
                    identity.register_forward_pre_hook(partial(self._take_in, pair), with_kwargs=True),
                ]

    def check(self) -> None:
        """Refuse values that were made and never reached their layer; call it after each batch.

        Raises:
            FoldError: Naming both layers.
        """
        for pair, given in self._given.items():
            if given:
                given.clear()
                raise _refused(pair, f"the output of {pair.producer!r} never reached {pair.batch_norm!r}")

    def close(self) -> None:
        """Take the hooks away; again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._given.clear()

    def _hand_out(self, pair: FoldPair, module: nn.Module, args: Any, output: Any) -> Any:
        if self._looks_away(pair):
            return None
        if not isinstance(output, Tensor):
            self.unwatched[pair.batch_norm] = f"{pair.producer!r} returns a {type(output).__name__}"
            return None
        handed = output
        if type(output) is Tensor:
            handed = output.as_subclass(_Reserved)
            handed.pair = pair
        self._given[pair].append((handed, output))
        return handed

    def _take_in(self, pair: FoldPair, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._looks_away(pair):
            return None
        (value,) = (*args, *kwargs.values())
        given = self._given[pair]
        for index, (handed, output) in enumerate(given):
            if handed is value:
                del given[index]
                return (output,), {}
        raise _refused(pair, f"{pair.batch_norm!r} is given something else than the output of {pair.producer!r}")

    def _looks_away(self, pair: FoldPair) -> bool:
        lent_out = not self._surgery.is_folded(pair)
        return lent_out or pair.batch_norm in self.unwatched or torch.compiler.is_compiling()


class _Reserved(Tensor):
    """An output of a folded layer on its way to the layer that was folded into it."""

    pair: FoldPair

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<output of {self.pair.producer!r}, with {self.pair.batch_norm!r} folded into it>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reserved = [tensor for tensor in iter_tensors((args, kwargs)) if isinstance(tensor, cls)]
        if reads_metadata(func):
            return super().__torch_function__(func, types, args, kwargs)
        if _may_pass(func, kwargs):
            result = super().__torch_function__(func, types, args, kwargs)
            if any(result is tensor for tensor in reserved):
                return result
        if not reserved:
            return NotImplemented
        pair = reserved[0].pair
        raise _refused(pair, f"the output of {pair.producer!r} is read by {function_name(func)}")


def _may_pass(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function that returns its very input has done nothing; one in place returns it, too."""
    in_place = kwargs.get("inplace", False) and kwargs.get("training", True)
    return function_name(function) in _PASSING and not in_place


def _called(name: str) -> str:
    return repr(name) if name else "the root module"


def _refused(pair: FoldPair, what: str) -> FoldError:
    return FoldError(
        f"{what}, but {pair.batch_norm!r} is folded into {pair.producer!r}, whose output is the normalized one now. "
        f"The recorded forward pass makes no such use. Keep the layer with exclude=[{pair.batch_norm!r}]."
    )
