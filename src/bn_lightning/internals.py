"""Every private torch or Lightning name in use, each with its fallback."""

from typing import Any

from torch import nn

__all__ = ["compiled_original", "hooks_on", "logging_step", "should_log_now"]


def compiled_original(model: nn.Module) -> nn.Module | None:
    """Return the module behind ``torch.compile(model)``, else ``None`` (``_orig_mod``)."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else None


def should_log_now(trainer: Any) -> bool:
    """Tell whether Lightning's own loggers write at this step (``_logger_connector.should_update_logs``)."""
    connector = getattr(trainer, "_logger_connector", None)
    return bool(getattr(connector, "should_update_logs", True))


def logging_step(trainer: Any) -> int:
    """Return the step Lightning writes its own training metrics at (``_batches_that_stepped``).

    With several optimizers it differs from ``trainer.global_step``, which is the fallback.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def hooks_on(module: nn.Module) -> list[str]:
    """Name the kinds of forward and backward hooks a module carries (``_forward_hooks`` and its siblings)."""
    return [kind.strip("_").replace("_", " ") for kind in _HOOK_TABLES if getattr(module, kind, None)]


_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
