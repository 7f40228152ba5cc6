"""A module's own ``training_step`` as a loss to read: nothing is logged, no optimizer steps."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger

from bn_lightning.errors import AuditError

__all__ = ["no_step_because", "quietly", "training_step_of"]

_SPEAKING = ("log", "log_dict", "print")


def no_step_because(module: Any, owner: str = "BatchNormAudit") -> str | None:
    """Say why a module's ``training_step`` cannot be run for the loss of one batch; ``None`` if it can.

    Args:
        module: The LightningModule.
        owner: The callback whose ``step=`` is the cure.
    """
    if not module.automatic_optimization:
        return (
            "training_step optimizes by itself (automatic_optimization=False): give "
            f"{owner}(step=lambda module, batch: …), which returns a batch's loss"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        return (
            f"training_step draws its batches from dataloader_iter: give {owner}(step=lambda module, batch: …), "
            "which returns a batch's loss"
        )
    return None


def training_step_of(index_of: Callable[[Any], int]) -> Callable[[Any, Any], Any]:
    """Return a function ``(module, batch) -> loss`` that runs ``training_step`` as Lightning calls it.

    Args:
        index_of: A batch's ``batch_idx``, for a step that takes it.
    """

    def step(module: Any, batch: Any) -> Any:
        return module.training_step(*((batch, index_of(batch)) if _takes_index(module) else (batch,)))

    return step


@contextmanager
def quietly(trainer: Any, module: Any, owner: str = "BatchNormAudit") -> Iterator[None]:
    """Let ``self.log`` and loggers do nothing, in LightningModules inside of the module too, and optimizers refuse.

    Outside of a training step Lightning refuses ``self.log``; inside of one, what is run besides would be logged. As in
    ``fast_dev_run`` each logger is a ``DummyLogger``, which takes everything.
    """
    with ExitStack() as stack:
        for child in module.modules():
            if callable(getattr(child, "log_dict", None)) and callable(getattr(child, "log", None)):
                for name in _SPEAKING:
                    stack.callback(_shadow(vars(child), name, _nothing))
        for optimizer in trainer.optimizers:
            stack.callback(_shadow(vars(optimizer), "step", _refusal(owner)))
        loggers = list(trainer.loggers)
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield


def _takes_index(module: Any) -> bool:
    """Tell whether a step takes more than the batch, by Lightning's own rule: a second place, whatever its name."""
    parameters = inspect.signature(module.training_step).parameters.values()
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return len(places) > 1 or any(each.kind is each.VAR_POSITIONAL for each in parameters)


def _shadow(attributes: dict[str, Any], name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an object itself, past its ``__setattr__``, and return how to take that back."""
    held, had = attributes.get(name), name in attributes
    attributes[name] = value

    def take_back() -> None:
        if had:
            attributes[name] = held
        else:
            del attributes[name]

    return take_back


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _refusal(owner: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AuditError(
            "an optimizer was to step while the loss was read, which would train the network: give "
            f"{owner}(step=lambda module, batch: …), which only returns a batch's loss"
        )

    return refuse
