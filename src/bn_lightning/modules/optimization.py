"""Optimizers and learning-rate schedules by name, with options that a configuration file can hold."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from bn_lightning.errors import BatchNormError, first_line, nearest

__all__ = ["build_optimizer", "build_schedule"]


def build_optimizer(
    name: str, groups: Iterable[Any], learning_rate: float, options: Mapping[str, Any] | None = None
) -> Optimizer:
    """Make an optimizer of ``torch.optim``.

    Args:
        name: Its class, in any case: ``sgd``, ``AdamW``, ….
        groups: Parameter groups, see `decay_groups`.
        learning_rate: Per step.
        options: Of its constructor; SGD has Nesterov momentum of 0.9 unless they say otherwise.

    Raises:
        BatchNormError: If there is no such optimizer, or it does not take these groups or options.

    Example:
        >>> optimizer = build_optimizer("adamw", [torch.zeros(1, requires_grad=True)], 1e-3, {"betas": (0.9, 0.95)})
        >>> type(optimizer).__name__, optimizer.defaults["betas"]
        ('AdamW', (0.9, 0.95))
    """
    kind = _OPTIMIZERS.get(name.lower())
    if kind is None:
        raise BatchNormError(
            f"torch.optim has no optimizer {name!r}{nearest(name, _OPTIMIZERS)}; there are {', '.join(_OPTIMIZERS)}."
        )
    given = dict(options or {})
    if kind is SGD:
        given = {"momentum": 0.9, **given}
        given.setdefault("nesterov", given["momentum"] > 0)
    try:
        optimizer: Optimizer = kind(list(groups), lr=learning_rate, **given)
    except Exception as error:
        raise BatchNormError(
            f"{kind.__name__} cannot be made with learning_rate={learning_rate} and optimizer_options={given} "
            f"({first_line(error)})."
        ) from error
    # torch keeps any entry of a group, also one that its optimizer never reads.
    if "weight_decay" not in optimizer.defaults and any(group.get("weight_decay") for group in optimizer.param_groups):
        raise BatchNormError(f"{kind.__name__} knows no weight decay: set weight_decay=0.")
    return optimizer


def build_schedule(
    name: str,
    optimizer: Optimizer,
    options: Mapping[str, Any] | None = None,
    *,
    steps: Callable[[], float],
    epochs: int | None,
) -> LRSchedulerConfigType | None:
    """Make a learning-rate schedule, as ``configure_optimizers`` returns it.

    Args:
        name: ``one_cycle``, whose peak is the optimizer's rate, or ``cosine``: over the whole training run, step by
            step. ``step``: a tenth after each third of the epochs. ``constant`` or ``none``. Or another class of
            ``torch.optim.lr_scheduler``, which advances after each epoch; ``ReduceLROnPlateau`` watches ``val/loss``.
        optimizer: Whose rate it moves.
        options: Of the class's constructor.
        steps: Returns the optimizer steps of the run, asked only where they are needed; infinite if nobody knows.
        epochs: Of the run; ``None`` or -1 if nobody knows.

    Returns:
        ``None`` for a constant rate.

    Raises:
        BatchNormError: If there is no such schedule, it does not take these options, or the run's length is needed and
            unknown.

    Example:
        >>> optimizer = build_optimizer("sgd", [torch.zeros(1, requires_grad=True)], 0.1)
        >>> made = build_schedule("cosine", optimizer, {"eta_min": 0.01}, steps=lambda: 500, epochs=None)
        >>> type(made["scheduler"]).__name__, made["scheduler"].T_max, made["interval"]
        ('CosineAnnealingLR', 500, 'step')
    """
    if name in _NONE:
        if options:
            raise BatchNormError(f"schedule={name!r} takes no options, got schedule_options={options}.")
        return None
    kind, interval = _SHORT.get(name, (name, "epoch"))
    if kind not in _SCHEDULES:
        names = [*_SHORT, *_NONE, *_SCHEDULES]
        raise BatchNormError(f"no schedule is called {name!r}{nearest(name, names)}; there are {', '.join(names)}.")
    given = {**_defaults(name, optimizer, options or {}, steps, epochs), **(options or {})}
    try:
        scheduler = _SCHEDULES[kind](optimizer, **given)
    except Exception as error:
        raise BatchNormError(f"{kind} cannot be made with schedule_options={given} ({first_line(error)}).") from error
    return {"scheduler": scheduler, "interval": interval, "monitor": "val/loss"}


def _defaults(
    name: str, optimizer: Optimizer, options: Mapping[str, Any], steps: Callable[[], float], epochs: int | None
) -> dict[str, Any]:
    if name == "one_cycle":
        # The cycle's own momentum schedule would overrule the optimizer's options.
        peaks = [group["lr"] for group in optimizer.param_groups]
        return {"max_lr": peaks, "total_steps": _counted(name, steps()), "cycle_momentum": False}
    if name == "cosine":
        return {"T_max": _counted(name, steps())}
    if name == "step" and "step_size" not in options:
        if epochs is None or epochs < 1:
            raise BatchNormError(
                "schedule='step' goes down after each third of the epochs, and the Trainer has no max_epochs; give "
                "schedule_options={'step_size': …}, in epochs."
            )
        return {"step_size": math.ceil(epochs / 3)}
    return {}


def _counted(name: str, steps: float) -> int:
    if not math.isfinite(steps) or steps < 1:  # Lightning says -1 for an endless iterable
        raise BatchNormError(
            f"schedule={name!r} spans the whole training run, whose length the Trainer does not know; give "
            "Trainer(max_steps=…), or schedule='constant'."
        )
    return int(steps)


def _classes(module: Any, base: type) -> dict[str, Any]:
    kinds = {name: kind for name, kind in vars(module).items() if isinstance(kind, type) and not name.startswith("_")}
    return {name: kind for name, kind in sorted(kinds.items()) if issubclass(kind, base) and kind is not base}


_OPTIMIZERS = {name.lower(): kind for name, kind in _classes(torch.optim, Optimizer).items()}
_SCHEDULES = _classes(lr_scheduler, LRScheduler)
# torch's class, and when it advances.
_SHORT = {"one_cycle": ("OneCycleLR", "step"), "cosine": ("CosineAnnealingLR", "step"), "step": ("StepLR", "epoch")}
_NONE = ("constant", "none")
