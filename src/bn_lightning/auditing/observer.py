"""What watches layers while the audit's passes run."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["PASSES", "Observer", "each_call", "each_input", "observed_batch"]

# Over the training batches; over the batches whose losses are read; over the evaluation batches if there are any.
PASSES = ("population", "full_training", "recalibrated", "deployed", "evaluation_population", "evaluation_statistics")


class Observer:
    """Measures something during passes that the audit makes anyway, by hooks that are gone after each pass.

    Attributes:
        passes: During which of `PASSES` it watches. ``population`` runs over the training batches, every selected layer
            normalizing by the batch and all else in evaluation mode.
    """

    passes: ClassVar[tuple[str, ...]] = ("population",)

    def watching(
        self, network: nn.Module, layers: Mapping[str, _BatchNorm], name: str
    ) -> AbstractContextManager[object]:
        """Attach hooks for the length of one pass, ``name``."""
        raise NotImplementedError

    def begin_batch(self) -> None:
        """Forget what came since the last whole batch: it is of one that failed on its way."""

    def end_batch(self) -> None:
        """Take note that a batch went through whole; what came since the last one belongs to it."""


@contextmanager
def observed_batch(observers: Iterable[Observer]) -> Iterator[None]:
    """Tell observers of one batch: that it begins and, unless it fails, that it has ended."""
    observers = tuple(observers)
    for observer in observers:
        observer.begin_batch()
    yield
    for observer in observers:
        observer.end_batch()


@contextmanager
def each_input(layers: Mapping[str, _BatchNorm], see: Callable[[str, _BatchNorm, Tensor], None]) -> Iterator[None]:
    """Show every input that layers are given, (N, C, *), as it is."""

    def show(name: str, layer: nn.Module, x: Tensor) -> None:
        if x.dim() >= 2:
            see(name, layers[name], x)

    with each_call(layers, show, keyword="input"):
        yield


@contextmanager
def each_call(
    modules: Mapping[str, nn.Module], see: Callable[[str, nn.Module, Tensor], None], *, keyword: str | None = None
) -> Iterator[None]:
    """Show the first tensor that modules are called with, by position or else by keyword (any, if none is named)."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = kwargs.values() if keyword is None else (kwargs.get(keyword),)
            x = next((each for each in (*args, *named) if isinstance(each, Tensor)), None)
            if x is not None:
                see(name, module, x.detach())

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook_for(name), with_kwargs=True).remove)
        yield
