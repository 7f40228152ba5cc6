"""The registry of rules; one file a family."""

from bn_lightning.auditing.rules import (
    batches,
    convergence,
    device,
    forwards,
    freezing,
    momentum,
    numerics,
    processes,
    shift,
    statistics,
    structure,
)
from bn_lightning.auditing.rules.rule import Rule

__all__ = ["RULES", "Rule"]

RULES: tuple[Rule, ...] = (
    *statistics.RULES,
    *momentum.RULES,
    *convergence.RULES,
    *numerics.RULES,
    *freezing.RULES,
    *structure.RULES,
    *batches.RULES,
    *shift.RULES,
    *forwards.RULES,
    *processes.RULES,
    *device.RULES,
)
