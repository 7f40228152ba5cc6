"""Watch folded layers at work: what a folded layer gives is for the layer that was folded into it, and nobody else."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import FoldError
from bn_lightning.folding.steps import FoldStep
from bn_lightning.folding.surgery import Surgery
from bn_lightning.internals import is_compiled
from bn_lightning.tracing.layers import function_name, reads_metadata
from bn_lightning.tracing.nested import iter_tensors

__all__ = ["FoldGuard"]

# They give the same values in another layout, dtype or place, or their very input where that is what it has; the
# example inputs may have had it, and under autocast the next ones have not.
_CASTS = frozenset({"contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"})
# In evaluation they return their very input.
# fmt: off
_PASSING = frozenset(
    {
        "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "pos", "positive",
        "resolve_conj", "resolve_neg",
    }
)
# fmt: on


class FoldGuard:
    """Hooks that refuse a use of a folded layer which the example inputs did not show.

    A fold was verified on what the example calls reach. Code that calls the folded layer on its own, or gives the
    BatchNorm layer something else, would silently get other numbers; here it gets a `FoldError` at that very line,
    or, where folds go forward, into several layers or through other operations, from `check`.
    The values themselves are passed on untouched, and nothing waits for a device.

    Attributes:
        unwatched: For each BatchNorm layer that cannot be watched, why.
        by_order: For each one that is not watched value by value, why: that it and its targets are called in the
            recorded order is all that `check` finds.

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
        self.by_order: dict[str, str] = {}
        # Each value handed out and not yet taken in: as it was handed out, and as it was.
        self._given: dict[str, list[tuple[Any, Tensor]]] = {}
        self._called: dict[str, list[str]] = {}
        self._handles: list[Any] = []
        for step in surgery.steps:
            if not step.targets:
                continue  # a scale and shift in its place changes nothing elsewhere
            modules = {name: model.get_submodule(name) for order in step.order for name in order}
            if any(id(module) in compiled for module in modules.values()):
                self.unwatched[step.name] = "torch.compile runs it"
            elif step.roundabout is None:
                self._given[step.name] = []
                self._handles += [
                    modules[step.targets[0].layer].register_forward_hook(partial(self._hand_out, step)),
                    modules[step.name].register_forward_pre_hook(partial(self._take_in, step), with_kwargs=True),
                ]
            else:
                self.by_order[step.name], self._called[step.name] = step.roundabout, []
                self._handles += [
                    module.register_forward_pre_hook(partial(self._note_call, step, name))
                    for name, module in modules.items()
                ]

    def check(self) -> None:
        """Refuse values that never reached their layer, and calls in another order than recorded; for after each batch.

        Raises:
            FoldError: Naming the layers.
        """
        for step in self._surgery.steps:
            given, called = self._given.get(step.name), self._called.get(step.name, [])
            if given:
                given.clear()
                raise _refused(step, f"the output of {step.into!r} never reached {step.name!r}")
            seen = list(called)
            called.clear()
            if not _repeats(seen, step.order):
                raise _refused(step, f"{', '.join(map(repr, seen[:8]))} were called in this order")

    def close(self) -> None:
        """Take the hooks away; again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._given.clear()
        self._called.clear()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy of a part of the network, such as an average of its weights, is not what is being watched.
        return _NoGuard, ()

    def _hand_out(self, step: FoldStep, module: nn.Module, args: Any, output: Any) -> Any:
        if self._looks_away(step):
            return None
        if not isinstance(output, Tensor):
            self.unwatched[step.name] = f"{step.into!r} returns a {type(output).__name__}"
            return None
        handed = output
        if type(output) is Tensor:
            handed = output.as_subclass(_Reserved)
            handed.step = step
        self._given[step.name].append((handed, output))
        return handed

    def _take_in(self, step: FoldStep, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._looks_away(step):
            return None
        (value,) = (*args, *kwargs.values())
        given = self._given[step.name]
        for index, (handed, output) in enumerate(given):
            if getattr(value, "origin", value) is handed:
                del given[index]
                return (output if value is handed else value.as_subclass(Tensor),), {}
        raise _refused(step, f"{step.name!r} is given something else than the output of {step.into!r}")

    def _note_call(self, step: FoldStep, name: str, module: nn.Module, args: Any) -> None:
        if not self._looks_away(step):
            self._called[step.name].append(name)

    def _looks_away(self, step: FoldStep) -> bool:
        lent_out = not self._surgery.is_folded
        return lent_out or step.name in self.unwatched or torch.compiler.is_compiling()


class _NoGuard(FoldGuard):
    def __init__(self) -> None:
        pass

    def _looks_away(self, step: FoldStep) -> bool:
        return True


def _repeats(seen: list[str], orders: Sequence[tuple[str, ...]]) -> bool:
    """Whether a list of calls is made of recorded ones, one behind the other."""
    place = 0
    while place < len(seen):
        fitting = [order for order in orders if tuple(seen[place : place + len(order)]) == order]
        if not fitting:
            return False
        place += len(max(fitting, key=len))
    return True


class _Reserved(Tensor):
    """An output of a folded layer on its way to the layer that was folded into it."""

    step: FoldStep
    origin: Tensor  # of a cast: what was handed out

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<output of {self.step.into!r}, with {self.step.name!r} folded into it>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reserved = [tensor for tensor in iter_tensors((args, kwargs)) if isinstance(tensor, cls)]
        given = args[0] if args else None
        if function_name(func) in _CASTS and reserved:
            result = super().__torch_function__(func, types, args, kwargs)
            if result is given or not isinstance(result, Tensor):  # ``x.type()`` is a string
                return result
            if result.is_floating_point() and isinstance(given, cls):
                cast: Any = result
                cast.step, cast.origin = given.step, getattr(given, "origin", given)
                return cast
        elif reads_metadata(func):
            return super().__torch_function__(func, types, args, kwargs)
        elif _may_pass(func, kwargs):
            result = super().__torch_function__(func, types, args, kwargs)
            if any(result is tensor for tensor in reserved):
                return result
        if not reserved:
            return NotImplemented
        step = reserved[0].step
        raise _refused(step, f"the output of {step.into!r} is read by {function_name(func)}")


def _may_pass(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function that returns its very input has done nothing; one in place returns it, too."""
    in_place = kwargs.get("inplace", False) and kwargs.get("training", True)
    return function_name(function) in _PASSING and not in_place


def _refused(step: FoldStep, what: str) -> FoldError:
    return FoldError(
        f"{what}, but {step.name!r} is folded into {step.into!r}, whose output is the normalized one now. "
        f"The recorded forward pass makes no such use. Keep the layer with exclude=[{step.name!r}]."
    )
