"""The registry of rules; one file a family."""

from bn_lightning.auditing.rules import convergence, statistics
from bn_lightning.auditing.rules.rule import Rule

__all__ = ["RULES", "Rule"]

RULES: tuple[Rule, ...] = (*statistics.RULES, *convergence.RULES)
